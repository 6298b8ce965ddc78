"""Where the positions of a micro-batch stand, and which of them see each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [s, b or 1, 1, head_dim / 2], in the dtype of queries and keys."""


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Queries of this process and keys of whole sequences.

    Without context parallelism a process has all positions as queries; with it, it has two chunks of them; when one id
    after another is generated, it has the newest.
    """

    batch: int
    """Sequences of the micro-batch."""
    num_keys: int
    """Positions of a whole sequence, those on other ranks and cached ones included."""
    query_chunks: tuple[tuple[int, int], ...]
    """(start, length) of each run of queries among the keys, in the order in which this process holds them."""
    document_ids: Tensor | None
    """int [batch, num_keys]; a query sees earlier keys of its own document, whose ids stand together. None means one
    document a row."""
    device: torch.device
    """Where queries and keys are."""
    for_generation: bool = False
    """Whether this is one of many short reads, each of another length."""

    @property
    def covers_all_keys(self) -> bool:
        """Whether queries and keys are the same positions."""
        return self.query_chunks == ((0, self.num_keys),)

    def query_positions(self) -> Tensor:
        """int64 [s]: place of each query among the keys."""
        return torch.cat(
            [torch.arange(start, start + length, device=self.device) for start, length in self.query_chunks]
        )


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What all layers share of a micro-batch. It travels in megatron-core's slot for packed sequences, which
    recomputation passes by reference; the class attributes are what megatron-core reads there."""

    query_rotary: Rotary
    """For this process's queries."""
    key_rotary: Rotary
    """For its keys; in generation, for the cached ones too."""
    plan: Any
    """What the attention kernel made of the SequenceLayout."""
    gather_over: Any | None = None
    """Process group whose ranks hold the other keys of these sequences; None where all are here."""
    qkv_format: ClassVar[str] = "sbhd"
    cp_group: ClassVar[None] = None


def context_chunks(sequence_length: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of the runs of a sequence that one context-parallel rank holds.

    Rank r of n holds chunks r and 2n - 1 - r of 2n, megatron-core's order: each rank then sees as many keys.
    """
    if size == 1:
        return ((0, sequence_length),)
    length = sequence_length // (2 * size)
    return ((rank * length, length), ((2 * size - 1 - rank) * length, length))


def in_sequence_order(gathered: Tensor, size: int) -> Tensor:
    """[t, ...] of chunks as context-parallel ranks hold them, rank after rank, to the order of the sequence."""
    ranks = gathered.unflatten(0, (size, 2, -1))
    # The second chunks stand in falling order: rank r holds number 2n - 1 - r.
    return torch.cat((ranks[:, 0].flatten(0, 1), ranks[:, 1].flip(0).flatten(0, 1)))


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of RoPE (arXiv 2104.09864) for positions [b, s], computed in fp32."""
    # In fp32: bf16 has no whole number between 256 and 258.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.t().float()[:, :, None, None] * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def natural_positions(chunks: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """int64 [1, s]: positions that do not restart in documents."""
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in chunks])[None]
