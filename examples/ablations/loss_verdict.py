"""What it means that a loss moves, and that a run diverges: fixed before any alarm is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHED = 20
"""Steps that are averaged: batches of four samples make a single loss uncertain by 0.1 nats."""
RISE = 0.2
"""Nats above the lowest average so far."""


@dataclass(frozen=True, kw_only=True)
class LossVerdict:
    """What became of a run, by its loss alone."""

    moved: int | None
    """The step at which the average of the last 20 losses first lay 0.2 nats above the lowest such average before."""
    diverged: bool
    """It moved, and lies as much above at the end, or stopped being finite."""
    best: float
    """Lowest average."""
    last: float
    """Average at the end."""


def judge_loss(losses: Sequence[float]) -> LossVerdict:
    """Judge the losses of steps 1, 2, …; NaN for what was not finite."""
    values = np.asarray(losses, dtype=float)
    finite = np.isfinite(values)
    # only up to the first that is not finite: averages over it would all be NaN
    whole = values if finite.all() else values[: int(np.argmin(finite))]
    if len(whole) < SMOOTHED:
        return LossVerdict(moved=len(whole) + 1, diverged=True, best=float("nan"), last=float("nan"))
    averages = np.convolve(whole, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    above = averages - np.minimum.accumulate(averages) > RISE
    broke = not finite.all()
    moved = int(np.argmax(above)) + SMOOTHED if above.any() else (len(whole) + 1 if broke else None)
    diverged = broke or bool(above[-1])
    return LossVerdict(moved=moved, diverged=diverged, best=float(averages.min()), last=float(averages[-1]))
