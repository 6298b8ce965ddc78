"""Checkpoints of a real model's shape, with few layers and drawn weights, in every format that can be written."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box
from megachameleon.checkpoint.formats.conversion import convert
from megachameleon.checkpoint.formats.plain import Description, KnownHash
from megachameleon.checkpoint.formats.registry import Kind, Options, make_sink
from megachameleon.config import ModelConfig, load_config
from megachameleon.tokens.vocabulary import Vocabulary

TILE = 1 << 22
"""Values that are drawn; every tensor repeats them."""


@dataclass(frozen=True, kw_only=True)
class DrawnSource:
    """A checkpoint that is nowhere."""

    description: Description
    """Of the checkpoint that it stands for."""
    tile: Tensor = field(default_factory=lambda: torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * 0.02)
    """fp32 [TILE]."""

    def hashes(self) -> list[KnownHash]:
        """None: there are no files."""
        return []

    def read(self, name: str, box: Box) -> Tensor:
        """Values of the tile, over and over; the same for all groups of a QK-norm."""
        tile = self.tile.to(self.description.dtype)
        if "_norm." in name:
            return (1 + tile[: box.shape[-1]]).expand(box.shape)
        values = torch.empty(box.size, dtype=tile.dtype)
        for start in range(0, box.size, TILE):
            part = values[start : start + TILE]
            # repeated and not drawn: drawing gigabytes would take longer than converting them
            part.copy_(tile[: len(part)])
        return values.view(box.shape)


def shape_of(preset: str, num_layers: int) -> ModelConfig:
    """The model of a preset, such as `chameleon_34b`, with another number of layers and Chameleon's 65,536 ids."""
    return replace(load_config(preset).model, num_layers=num_layers, vocab_size=Vocabulary().size)


def draw_checkpoint(kind: Kind, model: ModelConfig, folder: Path, options: Options) -> None:
    """Write a checkpoint in bf16, without tokenizers.

    Raises:
        ValueError: the model, the folder or an option does not fit.
    """
    description = Description(
        model=model,
        dtype=torch.bfloat16,
        origin=Path("drawn"),
        identity="drawn",
        vocabulary=asdict(Vocabulary()),
        tokenizers={"text": None, "image": None},
        lineage={"datasets": {}, "parent": None, "starts": []},
    )
    convert(DrawnSource(description=description), make_sink(kind, description, options), folder)
