"""From logits to one id per row: temperature, top-k, top-p, repetition penalty, and draws that are the row's own."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How one modality is sampled.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.7
    """Logits are divided by it; the default is that of Chameleon's release."""
    top_p: float = 0.9
    """Keep the likeliest ids that together reach this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest ids; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of text ids that the row already holds; 1 does nothing."""
    greedy: bool = False
    """Take the likeliest id; temperature, top_p and top_k then do nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive; use greedy for the likeliest id")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all ids")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps all ids")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 does nothing")


def row_draws(seed: int, rows: Sequence[int], count: int) -> torch.Tensor:
    """Uniform draws in [0, 1), float64 [len(rows), count], each row from a generator of its own for (seed, row).

    All ranks compute the same draws on the CPU, and a row's draws do not depend on the batch that it is in.
    """
    generators = [torch.Generator().manual_seed(_row_seed(seed, row)) for row in rows]
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def _row_seed(seed: int, row: int) -> int:
    """48 bits; neighbouring seeds must not share draws, as `seed + row` would."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/row/{row}".encode(), digest_size=6).digest(), "little")


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make ids that were seen less likely. `logits` float [rows, ids], `seen` bool of the same shape."""
    # as in CTRL (Keskar et al., 2019): dividing a negative logit would make it likelier
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Pick one id per row by inverting the distribution at the row's draw.

    Args:
        logits: float [rows, ids]; forbidden ids are -inf, and at least one is not.
        draws: float64 [rows] in [0, 1).

    Returns:
        int64 [rows].
    """
    if settings.greedy:
        return logits.argmax(-1)
    count = min(settings.top_k, logits.size(-1)) if settings.top_k else logits.size(-1)
    # sorted by likelihood, which top-p and the inversion below both need
    values, ids = (logits / settings.temperature).topk(count)
    # fp64: sums over a large vocabulary decide which id a draw falls on
    probabilities = values.double().softmax(-1)
    # before and not with: the id that passes top_p is kept, so one always is
    reached_before = probabilities.cumsum(-1) - probabilities
    probabilities = (
        probabilities.masked_fill(reached_before >= settings.top_p, 0.0) if settings.top_p < 1 else probabilities
    )
    reached = probabilities.cumsum(-1)
    index = (reached <= draws.to(reached.device)[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    # rounding may place a draw near 1 behind the last id that is possible
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(index, last)).squeeze(-1)
