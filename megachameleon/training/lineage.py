"""What data comes from: its shards, and the tokenizers on which shards, configuration and checkpoints must agree.

The same ids mean other words and other pictures under another tokenizer of the same layout, and nothing else would show
it until someone looks at what the model writes and draws.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megachameleon.config import DataConfig
from megachameleon.data.packing.packed import PackedDataset
from megachameleon.tokens.text import TextTokenizer, text_tokenizer_file

Tokenizers = dict[str, str | None]
"""Fingerprints of the `text` and `image` tokenizers; None where the data has none."""


def tokenizers_of(datasets: Mapping[str, PackedDataset], data: DataConfig) -> Tokenizers:
    """The tokenizers that made all datasets, checked against those that the configuration names.

    Raises:
        ValueError: two datasets, or the data and the configuration, disagree; or a named tokenizer is missing.
    """
    found = _common_tokenizers(datasets)
    text_folder = Path(data.tokenizer)
    if text_tokenizer_file(text_folder):  # training itself needs only the vocabulary beside it
        _require("data.tokenizer", text_folder, TextTokenizer.load(text_folder).fingerprint, found["text"])
    if data.image_tokenizer is not None:
        from megachameleon.tokens.vq import ImageTokenizer

        image_folder = Path(data.image_tokenizer)
        _require("data.image_tokenizer", image_folder, ImageTokenizer.load(image_folder).fingerprint, found["image"])
    return found


def lineage_of(datasets: Mapping[str, PackedDataset]) -> dict[str, dict[str, Any]]:
    """What checkpoints record of the datasets of training, by name."""
    return {
        name: {
            "fingerprint": packed.summary.fingerprint,  # of the samples
            "content": packed.summary.content,  # a hash over the data files of all shards
            "shards": packed.summary.shards,
            "documents": packed.summary.documents,
            "tokens": packed.summary.tokens,
        }
        for name, packed in datasets.items()
    }


def require_same_tokenizers(checkpoint: Path, saved: Tokenizers, mine: Tokenizers) -> None:
    """Refuse weights to which the same ids mean other words or pictures.

    Raises:
        ValueError: the fingerprints of two tokenizers differ.
    """
    for kind, wanted in mine.items():
        found = saved.get(kind)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(
                f"{checkpoint}: was trained with another {kind} tokenizer ({found}) than the one that made the shards "
                f"({wanted}); preprocess with that one, or take another checkpoint"
            )


def _common_tokenizers(datasets: Mapping[str, PackedDataset]) -> Tokenizers:
    found: Tokenizers = {"text": None, "image": None}
    for name, packed in datasets.items():
        for kind, fingerprint in (("text", packed.summary.tokenizer), ("image", packed.summary.image_tokenizer)):
            if None not in (found[kind], fingerprint) and found[kind] != fingerprint:
                raise ValueError(
                    f"data: dataset {name} was made with another {kind} tokenizer ({fingerprint}) than the datasets "
                    f"before it ({found[kind]}); preprocess all of them with the same one"
                )
            found[kind] = found[kind] or fingerprint
    return found


def _require(key: str, folder: Path, mine: str, wanted: str | None) -> None:
    if wanted not in (None, mine):
        raise ValueError(
            f"{key}={folder}: is not the tokenizer that made the shards (fingerprint {mine}, not {wanted}); "
            "name that one"
        )
