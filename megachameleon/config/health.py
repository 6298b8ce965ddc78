"""What counts as trouble in training, and what is done about it."""

import math
from dataclasses import dataclass
from typing import Literal

SpikePolicy = Literal["off", "log", "skip", "rollback"]
EarlyWarningPolicy = Literal["off", "log", "lower_lr", "rollback", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """Spikes and early warning. What is not finite never reaches the optimizer, whatever stands here."""

    spike_policy: SpikePolicy = "skip"
    """When loss or gradient norm lie beyond `spike_deviations`: `log` says so, `skip` leaves the update out, `rollback`
    goes back to the newest checkpoint before it and passes over the samples since."""
    spike_deviations: float = 10.0
    """How far above the median of the window a value may lie, in robust deviations (1.4826 times the median absolute
    deviation; of the logarithm for gradient norms)."""
    spike_window: int = 128
    """Accepted steps to compare with. Nothing is judged before half of them are there."""
    max_skips_in_a_row: int = 3
    """After that many steps without an update the level has changed or the run is broken: finite ones roll back, and
    what is not finite stops the run."""
    early_warning: EarlyWarningPolicy = "log"
    """When output norms or log Z grow out of bounds, which precedes divergence: `log` says so, `lower_lr` halves the
    learning rate, `rollback` goes back to the newest checkpoint before it and halves it too, `stop` ends the run."""
    early_warning_growth: float = 4.0
    """How many times its own level in the second half of the run so far an output norm may become. 5 tells less often
    and later (docs/stability.md)."""
    early_warning_after: int | None = None
    """Steps before which it does not look, since norms rise from their initial values; None: the warm-up."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        if not 3 <= self.spike_deviations < math.inf:
            raise ValueError(
                f"health.spike_deviations: {self.spike_deviations} must be a number, 3 or more; below that ordinary "
                "steps count as spikes"
            )
        if self.spike_window < 16:
            raise ValueError(f"health.spike_window: {self.spike_window} must be at least 16 steps")
        if not 1.5 <= self.early_warning_growth < math.inf:
            raise ValueError(
                f"health.early_warning_growth: {self.early_warning_growth} must be a number, 1.5 or more; norms of "
                "ordinary runs grow by less than that all the time"
            )
        for name in ("max_skips_in_a_row", "early_warning_after"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"health.{name}: {getattr(self, name)} must be 0 or more")
