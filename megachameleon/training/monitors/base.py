"""What a monitor is: it measures on the device during a step, and its values are read with the step's other numbers."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megachameleon.parallel.context import ParallelContext
    from megachameleon.training.batches import Batch
    from megachameleon.training.step import TrainingState


class Monitor:
    """Measures nothing; subclasses override what they need. All ranks do the same, each with its part of the model."""

    def begin(self, step: int) -> None:
        """Before the forward pass of step `step` (counted from 1): clear, and decide whether to measure this one."""

    def follow(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        """The micro-batches of the step on their way to the model; they must stay what they are."""
        return batches

    def after_backward(self, state: "TrainingState") -> None:
        """When gradients are summed over replicas, before the update."""

    def after_update(self, state: "TrainingState") -> None:
        """When the weights are new."""

    def sums(self) -> Tensor | None:
        """float64 [n] on the device, to be summed over all ranks; each counts its own share once. None: idle."""
        return None

    def maxima(self) -> Tensor | None:
        """float64 [m] on the device, of which the largest over all ranks is taken. None: idle."""
        return None

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """Named values from the reduced ones, such as `output_norm/image`."""
        return {}


def reduce_monitors(monitors: Sequence[Monitor], context: "ParallelContext") -> tuple[Tensor, list[tuple[int, int]]]:
    """One all-reduce for sums, one for maxima; values in a row, float64 [n], and how many of each a monitor has."""
    empty = torch.zeros(0, dtype=torch.float64, device=context.device)
    sums = [_or(monitor.sums(), empty) for monitor in monitors]
    maxima = [_or(monitor.maxima(), empty) for monitor in monitors]
    all_sums, all_maxima = torch.cat([empty, *sums]), torch.cat([empty, *maxima])
    # At a step all ranks are idle alike: a message that only some of them send would hang.
    if all_sums.numel():
        dist.all_reduce(all_sums)
    if all_maxima.numel():
        dist.all_reduce(all_maxima, op=dist.ReduceOp.MAX)
    sizes = [(a.numel(), b.numel()) for a, b in zip(sums, maxima, strict=True)]
    return torch.cat((all_sums, all_maxima)), sizes


def _or(values: Tensor | None, empty: Tensor) -> Tensor:
    return empty if values is None else values


def report_monitors(
    monitors: Sequence[Monitor], sizes: Sequence[tuple[int, int]], values: Sequence[float]
) -> dict[str, float]:
    """What all monitors have to say, from the values of `reduce_monitors` on the host."""
    report: dict[str, float] = {}
    at_sum, at_maximum = 0, sum(size for size, _ in sizes)
    for monitor, (num_sums, num_maxima) in zip(monitors, sizes, strict=True):
        if num_sums or num_maxima:
            report |= monitor.report(values[at_sum : at_sum + num_sums], values[at_maximum : at_maximum + num_maxima])
        at_sum, at_maximum = at_sum + num_sums, at_maximum + num_maxima
    return report
