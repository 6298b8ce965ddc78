"""When a run stops by itself, and how it notices that a process is dead, hung or slow."""

import math
from dataclasses import dataclass

from megachameleon.config.durations import parse_duration


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """Stopping politely, and not hanging."""

    max_duration: str | int | float | None = None
    """Time after which the run saves and stops, counted from the start of the SLURM job, else of the process; it stops
    early enough that a step and a checkpoint still fit. Like `3h50m`, `230m`, `2-00:00:00`, or seconds."""
    hang_timeout: float = 600.0
    """Seconds that a step may take. After them the run is taken for hung: every process ends, and those that were
    behind are named. Must be longer than the longest step."""
    start_timeout: float = 1_800.0
    """The same for all that is rare and slow: starting, loading, the first step, waiting for a checkpoint, drawing."""
    straggler_factor: float = 1.5
    """A process whose forward passes take that many times as long as others' with the same work is named; 0: never."""
    straggler_window: int = 20
    """Steps over which that is measured."""
    max_rollbacks: int = 10
    """Roll-backs in the whole run, after which it stops and asks for a person."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        if self.max_duration is not None:
            parse_duration(self.max_duration, "faults.max_duration")
        for name in ("hang_timeout", "start_timeout"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"faults.{name}: {getattr(self, name)} must be 1 second or more")
        if self.straggler_factor and not 1.05 <= self.straggler_factor < math.inf:
            raise ValueError(f"faults.straggler_factor: {self.straggler_factor} must be 1.05 or more, or 0 for never")
        if self.straggler_window < 3:
            raise ValueError(f"faults.straggler_window: {self.straggler_window} must be 3 steps or more")
        if self.max_rollbacks < 0:
            raise ValueError(f"faults.max_rollbacks: {self.max_rollbacks} must be 0 or more")
