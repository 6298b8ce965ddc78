"""How large hidden states are: behind the last block at each step, behind every block now and then.

The norm is that of a token's hidden state (L2 over its elements), averaged over tokens as a root mean square. Behind
the last block, before the final norm, its growth precedes divergence (arXiv 2405.09818, section 2.3.2 and Figure 5a).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import IMAGE, TEXT, ForwardWatch

MODALITIES = {"text": TEXT, "image": IMAGE}


class HiddenNorms(Monitor):
    """Norms behind some blocks, over all tokens that carry loss and by the modality of what they predict."""

    def __init__(self, watch: ForwardWatch, names: dict[int, str], every: int = 1) -> None:
        """
        Args:
            names: place of a block, from 0, to the name of its norm in the report; the same on all ranks.
            every: steps between measurements.
        """
        self.watch, self.every = watch, every
        self.names = list(names.values())
        self._active = False
        self._sums = torch.zeros(len(names), 2, 2, dtype=torch.float64, device=watch.context.device)
        row_of = {layer: row for row, layer in enumerate(names)}
        for number, layer in watch.layers():
            if number in row_of:
                layer.register_forward_hook(self._hook(row_of[number]))

    def begin(self, step: int) -> None:
        """Clear."""
        self._active = step % self.every == 0
        self._sums.zero_()

    def sums(self) -> Tensor | None:
        """By block: squared norms of text and pictures, tokens of text and pictures; float64 [4 x blocks]."""
        return self._sums.flatten() if self._active else None

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """Root mean squares: `name`, `name/text`, `name/image`; without those of which there were no tokens."""
        report = {}
        for row, name in enumerate(self.names):
            squares, counts = sums[4 * row : 4 * row + 2], sums[4 * row + 2 : 4 * row + 4]
            report[name] = _root_mean(sum(squares), sum(counts))
            report |= {f"{name}/{key}": _root_mean(squares[i], counts[i]) for key, i in MODALITIES.items()}
        return {name: value for name, value in report.items() if value is not None}

    def _hook(self, row: int) -> Any:
        @torch.no_grad()
        def measure(layer: nn.Module, arguments: Any, output: tuple[Tensor, Any]) -> None:
            if self._active and self.watch.inside:
                modality = self.watch.own_modality()
                norms = torch.linalg.vector_norm(self.watch.own_rows(output[0]), dim=-1, dtype=torch.float32)
                self._sums[row, 0] += modality @ norms.double().square()
                self._sums[row, 1] += modality.sum(1)

        return measure


def output_norm(watch: ForwardWatch, num_layers: int) -> HiddenNorms:
    """Behind the last block, at each step: `output_norm`, `output_norm/text`, `output_norm/image`."""
    return HiddenNorms(watch, {num_layers - 1: "output_norm"})


def block_norms(watch: ForwardWatch, num_layers: int, every: int) -> HiddenNorms:
    """Behind each block, counted from 0: `block_norm/3`, `block_norm/3/text`, `block_norm/3/image`."""
    return HiddenNorms(watch, {layer: f"block_norm/{layer}" for layer in range(num_layers)}, every)


def _root_mean(total: float, count: float) -> float | None:
    """None without tokens; NaN and infinity stay what they are."""
    if not count:
        return None
    return math.sqrt(total / count) if total >= 0 else math.nan
