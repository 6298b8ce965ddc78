"""Who is slow: how long forward passes take on each rank, and which rank takes longer than others with the same work.

All ranks of a synchronous step take equally long, since they wait for the slowest. Forward passes do not wait for other
pipeline stages or replicas, only for tensor- and context-parallel partners: so those of a slow rank are slow with it,
and are named with it. Reading the data counts too. Backward passes do not: their collectives cannot be told from work.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megachameleon.training.pulse import Peer

LEAST_SHARE = 0.05
"""Of a step's time that a rank must be late by to be worth a line."""
REMINDER_WINDOWS = 50
"""Windows after which a rank that is still slow is named again."""


class ForwardClock:
    """Time of this process's forward passes. On CUDA by events, which are read when the step is over anyway."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While the host reads data."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """While the model computes."""
        if not self._on_gpu:
            with self.reading():
                yield
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    def take(self) -> float:
        """Seconds since this was last called; the device must have finished."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class StragglerWatch:
    """Compares ranks over windows of steps. For the main process."""

    def __init__(self, peers: Sequence[Peer], *, factor: float, window: int) -> None:
        """Args: what counts as slow, in times the others' median (0: nothing does), and the steps of a window."""
        self.peers, self.factor, self.window = peers, factor, window
        # Stages have different work: one with the head is not slow for taking longer.
        stages = np.array([peer.stage for peer in peers], dtype=np.int64)
        self._alike = [np.flatnonzero(stages == stage) for stage in np.unique(stages)]
        self._rows: list[Sequence[float]] = []
        self._steps: list[float] = []
        self._best: np.ndarray | None = None
        self._named: dict[int, int] = {}
        """Slow ranks, and windows since they were named."""

    def observe(self, step: int, busy: Sequence[float], seconds: float) -> list[str]:
        """Lines to print after a step.

        Args:
            busy: seconds of forward passes by rank.
            seconds: of the whole step.
        """
        if not self.factor or len(busy) != len(self.peers) or not any(busy):
            return []
        self._rows.append(busy)
        self._steps.append(seconds)
        if len(self._rows) < self.window:
            return []
        mine, step_seconds = np.median(np.array(self._rows), axis=0), float(np.median(self._steps))
        self._rows, self._steps = [], []
        usual = self._usual(mine)
        # A short pass may vary by much and cost nobody time, so it must be late by a share of the step too.
        slow = (mine > self.factor * usual) & (mine - usual > LEAST_SHARE * step_seconds)
        return [*self._still(mine, usual, slow, step), *self._again(slow)]

    def _usual(self, mine: np.ndarray) -> np.ndarray:
        """What each rank should take: the median of those with the same work, the faster of two, or its own best."""
        self._best = mine if self._best is None else np.minimum(self._best, mine)
        usual = np.empty_like(mine)
        for ranks in self._alike:
            # The lower median: of two ranks the faster one, beside which the other can be slow.
            middle = np.partition(mine[ranks], (len(ranks) - 1) // 2)[(len(ranks) - 1) // 2]
            usual[ranks] = middle if len(ranks) > 1 else self._best[ranks]
        return usual

    def _still(self, mine: np.ndarray, usual: np.ndarray, slow: np.ndarray, step: int) -> list[str]:
        lines = []
        for rank in map(int, np.flatnonzero(slow)):
            windows = self._named.get(rank, -1) + 1
            self._named[rank] = windows
            if windows % REMINDER_WINDOWS == 0:
                alone = next(len(ranks) == 1 for ranks in self._alike if rank in ranks)
                others = "it took at its best" if alone else "the others with the same work take"
                lines.append(
                    f"{self.peers[rank]} is slow: forward passes take {mine[rank] * 1e3:.0f} ms a step, "
                    f"{mine[rank] / max(usual[rank], 1e-9):.1f} times the {usual[rank] * 1e3:.0f} ms that {others} "
                    f"(steps {step - self.window + 1} to {step})"
                )
        return lines

    def _again(self, slow: np.ndarray) -> list[str]:
        back = [rank for rank in self._named if not slow[rank]]
        for rank in back:
            del self._named[rank]
        return [f"{self.peers[rank]} keeps up again" for rank in back]
