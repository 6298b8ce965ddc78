"""What the sampling benchmark compares, and the data that it reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megachameleon.data.blending.blending import BlendedSamples
from megachameleon.data.blending.megatron_order import MegatronSamples
from megachameleon.data.blending.mixture import Stage
from megachameleon.data.packing.packed import open_packed
from megachameleon.data.packing.packing import PackingMode
from megachameleon.data.packing.packing_job import pack_folder
from megachameleon.data.samples import to_tensors
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary

WEIGHTS = {"text": 0.4, "pairs": 0.4, "interleaved": 0.2}
BATCH = 8
RUN_SAMPLES = 100_000


@dataclass
class Reader:
    """Reads the next samples of a run, in batches of tensors."""

    batch: Callable[[range], Mapping[str, Any]]
    samples_per_step: int

    def step(self, number: int) -> float:
        """Read on; returns a sum over the ids, which needs all of them."""
        first = number * self.samples_per_step
        return sum(
            float(self.batch(range(start, start + BATCH))["tokens"].sum())
            for start in range(first, first + self.samples_per_step, BATCH)
        )


def build_reader(name: str, folder: Path, sequence_length: int, samples_per_step: int) -> Reader:
    """One contestant over the same shards: ours or ours-MODE, megatron or megatron-documents."""
    if name.startswith("ours"):
        mode: PackingMode = "continuous" if name.endswith("continuous") else "best_fit"
        datasets = {kind: open_packed([folder / kind], sequence_length, mode) for kind in WEIGHTS}
        blend = BlendedSamples.of(datasets, [Stage(None, WEIGHTS)], seed=1)
        return Reader(lambda positions: to_tensors(blend.batch(positions)), samples_per_step)
    theirs = MegatronSamples.of(
        {kind: [folder / kind] for kind in WEIGHTS},
        WEIGHTS,
        num_samples=RUN_SAMPLES,
        sequence_length=sequence_length,
        seed=1,
        isolate_documents=name == "megatron-documents",
    ).source
    collate = torch.utils.data.default_collate
    return Reader(lambda positions: collate([theirs[position] for position in positions]), samples_per_step)


def write_data(folder: Path, tokens: int, sequence_length: int) -> None:
    """Three datasets of one shard in Chameleon's vocabulary, of about `tokens` ids each, with packs and indices."""
    random = np.random.default_rng(0)
    vocabulary = Vocabulary()
    for kind in WEIGHTS:
        with ShardWriter(folder / kind / "shard", vocabulary, tokenizer="t", image_tokenizer="i") as writer:
            written = 0
            while written < tokens:
                document = _document(kind, random, vocabulary)
                writer.add(document)
                written += len(document)
            writer.commit()
        for mode in ("best_fit", "continuous"):
            pack_folder(folder / kind, sequence_length, mode)


def _document(kind: str, random: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
    def text(mean: int) -> np.ndarray:
        return random.integers(vocabulary.text_start, vocabulary.size, random.geometric(1 / mean) + 1)

    def picture() -> np.ndarray:
        return vocabulary.encode_image(random.integers(0, vocabulary.num_image_codes, vocabulary.codes_per_image))

    parts = {
        "text": lambda: [text(700)],
        "pairs": lambda: [picture(), text(40)],
        "interleaved": lambda: [part for _ in range(random.integers(1, 6)) for part in (text(200), picture())],
    }[kind]()
    return np.concatenate([[vocabulary.bos], *parts, [vocabulary.eos]]).astype(vocabulary.token_dtype)
