"""How much a series has grown of late, measured by its own past alone: no unit, no model size, no length of run.

Norms that settle grow ever more slowly: from half of the run so far to now they stay below a fixed factor. Norms that
have lost their hold (arXiv 2405.09818, Figure 5a) pass any factor, whether they grow like a power of the step, like an
exponential, or all at once.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

SMOOTHED = 16
"""Measurements of which the median is the level now; one outlier, or seven, say nothing."""
LASTING = 4
"""Steps together for which growth must be beyond its limit."""
MOST_ENTRIES = 64
"""Of the past. When they are full, neighbours are joined, so a run of any length is kept at the same cost."""


class GrowthTrend:
    """The past of one series in a bounded number of means, and its newest measurements as they are."""

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.past: list[float] = []
        """Means of `span` measurements each, oldest first."""
        self.span = SMOOTHED
        self.pending: list[float] = []

    @property
    def num_measured(self) -> int:
        """Measurements since the start, or since it was last cleared."""
        return len(self.past) * self.span + len(self.pending)

    def add(self, value: float) -> None:
        """Take in the next measurement; finite."""
        self.recent = [*self.recent, value][-SMOOTHED:]
        self.pending.append(value)
        if len(self.pending) < self.span:
            return
        self.past.append(fmean(self.pending))
        self.pending = []
        if len(self.past) == MOST_ENTRIES:
            # All entries stand for as many measurements, so the mean of two means is that of all.
            self.past = [(a + b) / 2 for a, b in zip(self.past[::2], self.past[1::2], strict=True)]
            self.span *= 2

    def growth(self) -> float:
        """How far the level now lies above the lowest of the second half of the past; 0 while there is too little."""
        # What settles grows like a logarithm: by less and less from half of the run to now.
        second_half = self.past[len(self.past) // 2 :]
        if len(self.past) < 2 or len(self.recent) < SMOOTHED:
            return 0.0
        return median(self.recent) - min(second_half)

    def level(self) -> float:
        """The level now: the median of the newest measurements."""
        return median(self.recent)

    def clear(self) -> None:
        """Begin again: what has been reached is the new normal."""
        self.recent, self.past, self.pending, self.span = [], [], [], SMOOTHED

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"recent": self.recent, "past": self.past, "pending": self.pending, "span": self.span}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.recent, self.past = list(state["recent"]), list(state["past"])
        self.pending, self.span = list(state["pending"]), state["span"]


class GrowthAlarm:
    """Follows one series, and tells when it has outgrown its past for some steps together.

    The level reached is then the new normal: the next alarm comes when it has grown as much again.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.trend = GrowthTrend()
        self.beyond = 0
        """Steps together for which growth has been beyond the limit."""

    def add(self, value: float) -> tuple[float, float] | None:
        """Take in the next measurement. At an alarm: the growth, and the level now."""
        self.trend.add(value)
        growth = self.trend.growth()
        self.beyond = self.beyond + 1 if growth > self.limit else 0
        if self.beyond < LASTING:
            return None
        level = self.trend.level()
        self.trend.clear()
        self.beyond = 0
        return growth, level

    def state_dict(self) -> dict[str, Any]:
        """Everything but the limit, as JSON."""
        return {"beyond": self.beyond, "trend": self.trend.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.beyond = state["beyond"]
        self.trend.load_state_dict(state["trend"])


def first_alarm(values: Sequence[float], limit: float) -> int | None:
    """The place in `values`, from 0, at which a `GrowthAlarm` first tells; None if it never does."""
    alarm = GrowthAlarm(limit)
    return next((i for i, value in enumerate(values) if math.isfinite(value) and alarm.add(value)), None)
