"""How far an update moves the weights: about 1e-3 of them is usual, much more or less says that the rate is wrong.

The update is computed again from Adam's moments as they stand after it, so no copy of the weights is kept; the memory
is three pieces of `PIECE` values.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megachameleon.parallel.optimizer_state import HeldState, held_states, parts_of
from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch
from megachameleon.training.monitors.parameter_groups import GROUPS, ParameterGroups

if TYPE_CHECKING:
    from megachameleon.training.step import TrainingState

# A copy of all weights, made at one step in a hundred, is where a run that just fits would die.
PIECE = 1 << 22


class UpdateRatios(Monitor):
    """`update_ratio/<group>`: RMS of the last update over RMS of the weights before it; 0 for a step left out."""

    def __init__(self, watch: ForwardWatch, groups: ParameterGroups, optimizer: Any, every: int) -> None:
        self.groups, self.optimizer, self.every = groups, optimizer, every
        self.device = watch.context.device
        self._sums: Tensor | None = None
        self._active = False
        self._updates_before: list[Any] = []

    def begin(self, step: int) -> None:
        """Remember Adam's count of updates, which shows whether this step made one."""
        self._active, self._sums = step % self.every == 0, None
        if self._active:
            self._updates_before = [_copy(count) for count in self._counts()]

    @torch.no_grad()
    def after_update(self, state: "TrainingState") -> None:
        """Squares of updates and weights that this rank answers for."""
        if not self._active:
            return
        sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=self.device)
        settings = self._settings()
        for group, held in self.groups.own(self.optimizer):
            for low in range(0, held.stop - held.start, PIECE):
                piece = held.part(low, min(low + PIECE, held.stop - held.start))
                sums[group] += _squares(piece, *settings[id(held.parameter)])
        self._sums = sums

    def sums(self) -> Tensor | None:
        """Squares of updates and of weights, by group: float64 [2 x groups]."""
        return None if self._sums is None else self._sums.flatten()

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """Ratios of root mean squares; without groups that have no weights, or only zeros."""
        pairs = {group: (sums[2 * i], sums[2 * i + 1]) for i, group in enumerate(GROUPS)}
        return {
            f"update_ratio/{group}": math.sqrt(update / weight) for group, (update, weight) in pairs.items() if weight
        }

    def _settings(self) -> dict[int, tuple[dict[str, Any], Any, Any]]:
        """By parameter: settings of its optimizer, its count of updates, and whether the last step made one."""
        settings = {}
        counts = list(self._counts())
        made = [count != before for count, before in zip(counts, self._updates_before, strict=True)]
        # By address: what is held are views, other objects than the tensors in Adam's state.
        places = {
            state["exp_avg"].data_ptr(): (group, number)
            for number, (group, state) in enumerate(_states(self.optimizer))
        }
        for held in held_states(self.optimizer):
            # An empty range has no address of its own.
            if held.stop > held.start:
                group, number = places[held.tensors["exp_avg"].data_ptr()]
                settings[id(held.parameter)] = (group, counts[number], made[number])
        return settings

    def _counts(self) -> Iterator[Any]:
        for group, state in _states(self.optimizer):
            yield state["step"] if "step" in state else group["step"]


def _states(optimizer: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings and state of each tensor that Adam updates."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            for main in group["params"]:
                yield group, part.optimizer.state[main]


def _squares(held: HeldState, settings: dict[str, Any], count: Any, made: Any) -> Tensor:
    """Sums of squares of the last update and of the weights before it, float64 [2]."""
    beta1, beta2 = settings["betas"]
    rate, decay = settings["lr"], settings["lr"] * settings["weight_decay"]
    weights = held.tensors.get("master")
    if weights is None:
        weights = held.parameter.detach().view(-1)[held.start : held.stop]
    moment, square = held.tensors["exp_avg"], held.tensors["exp_avg_sq"]
    # AdamW backwards: weights after it are (1 - decay) times those before, less the step.
    step = (square.sqrt() / (1 - beta2**count) ** 0.5).add_(settings["eps"]).reciprocal_()
    step.mul_(moment).mul_(rate / (1 - beta1**count))
    before = weights.add(step).div_(1 - decay)
    step.add_(before, alpha=decay)
    made = torch.as_tensor(made, device=weights.device)
    update = torch.linalg.vector_norm(step).double().square()
    # Without an update the moments may not have begun to exist: 0 / 0 above.
    return torch.stack(
        (
            torch.where(made, update, torch.zeros_like(update)),
            torch.linalg.vector_norm(torch.where(made, before, weights)).double().square(),
        )
    )


def _copy(count: Any) -> Any:
    return count.clone() if isinstance(count, Tensor) else count
