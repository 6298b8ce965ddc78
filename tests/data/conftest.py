"""Small vocabularies, documents and shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_sources import png, write_jsonl, write_tar

from megachameleon.data.documents import DocumentOptions
from megachameleon.data.preprocessing.plan_making import PlanOptions, plan_preprocessing
from megachameleon.data.shards.reader import Dataset
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import save_image_tokenizer


@pytest.fixture
def vocabulary() -> Vocabulary:
    """128 ids, pictures of 2 x 2 codes of 8."""
    return Vocabulary.compact(num_text_ids=113, num_image_codes=8, image_grid=(2, 2))


@pytest.fixture
def make_document(vocabulary: Vocabulary) -> Callable[..., np.ndarray]:
    """A function that makes a document: positive numbers are runs of text, 0 is a picture."""

    def make(*segments: int, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        parts = [np.array([vocabulary.bos])]
        for length in segments:
            if length:
                parts.append(random.integers(vocabulary.text_start, vocabulary.size, length))
            else:
                parts.append(vocabulary.encode_image(random.integers(0, 8, vocabulary.codes_per_image)))
        return np.concatenate([*parts, [vocabulary.eos]])

    return make


@pytest.fixture
def write_shard(vocabulary: Vocabulary) -> Callable[[Path, Sequence[np.ndarray]], Dataset]:
    """A function that writes documents as a shard and opens it."""

    def write(prefix: Path, documents: Sequence[np.ndarray]) -> Dataset:
        with ShardWriter(prefix, vocabulary, tokenizer="t" * 16, image_tokenizer="i" * 16) as writer:
            for document in documents:
                writer.add(document)
            writer.commit()
        return Dataset.open(prefix)

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tokenizer of pictures of 2 x 2 codes of 8."""
    vocabulary = Vocabulary.compact(num_text_ids=300, num_image_codes=8, image_grid=(2, 2))
    texts = [f"red green blue {number} squares of text and colours" for number in range(50)]
    folder = tmp_path_factory.mktemp("text_tokenizer")
    train_text_tokenizer(texts, vocabulary, folder)
    return folder


@pytest.fixture(scope="session")
def image_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained picture tokenizer, 8 px to 2 x 2 codes of 8."""
    torch.manual_seed(0)
    config = PatchConfig(image_size=8, grid=2, code_dim=4, fine_channels=4, coarse_channels=4)
    codebook = Codebook(8, config.code_dim)
    codebook.codes.normal_()
    folder = tmp_path_factory.mktemp("image_tokenizer")
    save_image_tokenizer(folder, config, PatchAutoencoder(config), codebook, {"seed": 0})
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """20 pictures with 2 captions each, an interleaved document, and 30 texts, in three files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    members: dict = {}
    for i in range(20):
        members[f"{i}.png"] = png(12 * i)
        members[f"{i}.json"] = {"captions": [{"lang": "en", "text": f"red {i}"}, {"lang": "de", "text": f"rot {i}"}]}
    write_tar(folder / "pairs.tar", members)
    segments = [{"text": "see"}, {"image": "0.png"}, {"text": "and"}, {"image": "1.png"}]
    write_tar(folder / "mixed.tar", {"d.json": {"segments": segments}, "d.0.png": png(0), "d.1.png": png(12)})
    write_jsonl(folder / "text.jsonl", *({"text": f"squares and colours {i}"} for i in range(30)))
    return folder


@pytest.fixture
def make_plan(raw: Path, tmp_path: Path, tokenizer_folder: Path, image_tokenizer_folder: Path) -> Callable[..., Path]:
    """A function that plans the preprocessing of `raw` and returns the output folder."""

    def make(
        name: str = "out",
        options: DocumentOptions | None = None,
        *,
        workers: int = 1,
        replace: bool = False,
        **how: Any,
    ) -> Path:
        folder = tmp_path / name
        tokenizers = tokenizer_folder, image_tokenizer_folder
        plan_preprocessing(
            [raw],
            folder,
            *tokenizers,
            options or DocumentOptions(),
            PlanOptions(**how),
            workers=workers,
            replace_plan=replace,
        )
        return folder

    return make
