"""An alarm before the loss moves: output norms, or log Z, have lost their hold.

The paper found that the norm of the last block's output grows without bound long before the loss of a mixed-modal
model diverges (arXiv 2405.09818, section 2.3.2 and Figure 5a), and advises to watch it and log Z. `growth.py` measures
growth; here stands how much is too much, and what follows. How often that is right is measured in docs/stability.md.
"""

import math
from typing import TYPE_CHECKING, Any

from megachameleon.config import HealthConfig
from megachameleon.training.health.growth import LASTING, SMOOTHED, GrowthAlarm
from megachameleon.training.health.guards import Action, Guard, Verdict

if TYPE_CHECKING:
    from megachameleon.training.callbacks.base import StepEvent
    from megachameleon.training.step import StepReport

LOG_Z_LIMIT = 3.0
"""Growth of the distance of log Z from 0 that is an alarm, in nats: the partition function is then 20-fold."""
LR_SCALE = 0.5
"""What the policies `lower_lr` and `rollback` multiply the learning rate by: other samples alone stop no growth."""


class EarlyWarning(Guard):
    """Watches the output norm of each modality, and log Z, from the end of the learning rate's warm-up on.

    A run that keeps growing is told so a few times, not at every step: see `GrowthAlarm`.
    """

    name = "early_warning"

    def __init__(self, config: HealthConfig, *, warmup_steps: int) -> None:
        """Know nothing yet.

        Args:
            warmup_steps: of the learning rate; nothing is judged before, unless the configuration says when.
        """
        after = config.early_warning_after
        self.policy, self.after = config.early_warning, warmup_steps if after is None else after
        self.norm_limit = math.log(config.early_warning_growth)
        self.alarms: dict[str, GrowthAlarm] = {}
        """By series."""

    def judge(self, event: "StepEvent") -> Verdict:
        """Follow the series, and say which have outgrown their past."""
        if self.policy == "off" or event.step <= self.after or event.report.skipped:
            return Verdict()
        found = [told for name, value in watched(event.report).items() if (told := self._follow(name, value))]
        if not found:
            return Verdict()
        action: Action = "continue" if self.policy == "log" else self.policy
        # The growth is that old at least: it had to fill the median, and then to last.
        since = max(event.step - SMOOTHED - LASTING, 1)
        reason = f"early warning at step {event.step}: {', '.join(found)}; such growth precedes divergence"
        return Verdict(action=action, reason=reason, since=since, lr_scale=LR_SCALE)

    def _follow(self, name: str, value: float) -> str | None:
        """Add the newest value of a series; what is wrong with it, in words."""
        told = self.alarms.setdefault(name, self._new(name)).add(value)
        if told is None:
            return None
        growth, level = told
        if name == "log_z":
            return f"log Z moved by {growth:.1f} to {level:.1f}"
        return f"{name} grew {math.exp(growth):.1f}-fold to {math.exp(level):.4g}"

    def _new(self, name: str) -> GrowthAlarm:
        return GrowthAlarm(LOG_Z_LIMIT if name == "log_z" else self.norm_limit)

    def state_dict(self) -> dict[str, Any]:
        """The past of each series."""
        return {name: alarm.state_dict() for name, alarm in self.alarms.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember again."""
        self.alarms = {name: self._new(name) for name in state}
        for name, alarm in self.alarms.items():
            alarm.load_state_dict(state[name])


def watched(report: "StepReport") -> dict[str, float]:
    """The series of a step, by name: logarithms of output norms, and the distance of log Z from 0. Finite ones."""
    norms = {name: value for name, value in report.monitors.items() if name.startswith("output_norm/")}
    series = {name: math.log(value) for name, value in norms.items() if 0 < value < math.inf}
    # z-loss pulls it to 0, so away from it is what counts, on either side.
    log_z = abs(report.losses.log_z)
    return {**series, "log_z": log_z} if math.isfinite(log_z) else series
