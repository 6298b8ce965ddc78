"""Gradient norms by kind of weight: which part of the model a growing gradient comes from."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch
from megachameleon.training.monitors.parameter_groups import GROUPS, ParameterGroups

if TYPE_CHECKING:
    from megachameleon.training.step import TrainingState


class GradientNorms(Monitor):
    """`gradient_norm/<group>`: L2, before clipping. Their squares add up to the square of the step's `grad_norm`."""

    def __init__(self, watch: ForwardWatch, groups: ParameterGroups, every: int) -> None:
        self.watch, self.groups, self.every = watch, groups, every
        self._squares: Tensor | None = None
        self._active = False

    def begin(self, step: int) -> None:
        """Clear."""
        self._active, self._squares = step % self.every == 0, None

    @torch.no_grad()
    def after_backward(self, state: "TrainingState") -> None:
        """Squares of the gradients that this rank answers for; they are sums over labels still."""
        if not self._active:
            return
        by_group: list[list[Tensor]] = [[] for _ in GROUPS]
        for group, held in self.groups.own(state.optimizer):
            gradient: Tensor = held.parameter.main_grad  # type: ignore[attr-defined]
            by_group[group].append(gradient.view(-1)[held.start : held.stop])
        zero = torch.zeros((), dtype=torch.float64, device=self.watch.context.device)
        self._squares = torch.stack(
            [torch.stack(torch._foreach_norm(some)).double().square().sum() if some else zero for some in by_group]
        )

    def sums(self) -> Tensor | None:
        """Tokens with loss, then squares by group: float64 [1 + groups]."""
        return None if self._squares is None else torch.cat((self.watch.num_tokens[None], self._squares))

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """Of the mean loss, as `grad_norm`."""
        num_tokens, *squares = sums
        return {
            f"gradient_norm/{group}": math.sqrt(square) / max(num_tokens, 1)
            for group, square in zip(GROUPS, squares, strict=True)
        }
