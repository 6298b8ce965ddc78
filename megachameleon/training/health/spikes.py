"""Steps whose loss or gradient norm stands out: left out or rolled back, and named with the samples in them."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from megachameleon.config import HealthConfig
from megachameleon.training.agreement import StepLimits, why_skipped
from megachameleon.training.health.guards import Guard, Verdict

if TYPE_CHECKING:
    from megachameleon.training.callbacks.base import StepEvent

NORMAL_PER_MAD = 1.4826
"""Standard deviation of a normal distribution, in its median absolute deviations."""
LEAST_LOSS_DEVIATION = 0.01
"""Of the median loss: one deviation is never taken for less. A run whose loss hardly moves would otherwise call every
ripple a spike."""
LEAST_NORM_DEVIATION = 0.2
"""The same for the logarithm of the gradient norm. With ten deviations no norm below 7 times the median is a spike;
single batches of ordinary runs reach 6 times (docs/stability.md)."""


def upper_limit(values: Sequence[float], deviations: float, least: float) -> float:
    """The largest value that is no spike among `values`: their median and `deviations` robust deviations above it.

    One-sided, so a loss that falls, as in warm-up, only makes it more generous.

    Args:
        values: at least one, finite.
        least: the smallest deviation to assume.
    """
    # The first spike would move a mean and a standard deviation; it does not move these.
    middle = median(values)
    deviation = NORMAL_PER_MAD * median([abs(value - middle) for value in values])
    return middle + deviations * max(deviation, least)


class SpikeGuard(Guard):
    """Compares each step with the accepted steps before it. A function of the reports alone: all ranks decide alike."""

    name = "spikes"

    def __init__(self, config: HealthConfig, *, batch_size: int, stage_ends: Sequence[int], look_up: str) -> None:
        """Remember nothing yet.

        Args:
            batch_size: samples in a step.
            stage_ends: positions of the blend at which other data begin; what came before is no measure for them.
            look_up: command that shows a sample, to which its position is appended.
        """
        self.config, self.batch_size, self.stage_ends, self.look_up = config, batch_size, tuple(stage_ends), look_up
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.in_a_row = 0
        self.stage = 0

    def limits(self) -> StepLimits:
        """Bounds on the device, if spikes are to be kept from the weights."""
        return self._normal() if self.config.spike_policy in ("skip", "rollback") else StepLimits()

    def judge(self, event: "StepEvent") -> Verdict:
        """Accept the step, or say what is wrong with it, with which samples, and what to do."""
        found = event.report.skipped or self._beyond(event)
        if found is None:
            self._accept(event)
            return Verdict()
        self.in_a_row += 1
        first, end = event.samples
        done = "not updated" if event.report.skipped else "updated all the same"
        what = f"step {event.step}: {found}; {done}; samples {first} to {end - 1} ({self.look_up} {first})"
        return self._answer(what, event.step, finite=math.isfinite(event.report.losses.loss + event.report.grad_norm))

    def _answer(self, what: str, step: int, *, finite: bool) -> Verdict:
        most, many = self.config.max_skips_in_a_row, self.in_a_row > self.config.max_skips_in_a_row
        if not finite:
            if not many:
                return Verdict(reason=what)
            return Verdict(action="stop", reason=f"{what}; more than health.max_skips_in_a_row={most} steps in a row")
        if self.config.spike_policy == "rollback":
            return Verdict(action="rollback", reason=what)
        if not many:
            return Verdict(reason=what)
        if self.config.spike_policy == "skip":
            return Verdict(
                action="rollback",
                since=step - most,
                reason=f"{what}; more than health.max_skips_in_a_row={most} steps in a row, so going back; if the new "
                "level is right, set health.spike_policy=log",
            )
        self._forget()
        return Verdict(reason=f"{what}; {most + 1} steps in a row, so this is taken for the new level")

    def _beyond(self, event: "StepEvent") -> str | None:
        """What is wrong with a step that has updated, under the policy `log`."""
        agreement = event.report.agreement
        if self.config.spike_policy != "log" or agreement is None:
            return None
        return why_skipped(agreement, self._normal())

    def _normal(self) -> StepLimits:
        if len(self.losses) < self.config.spike_window // 2:
            return StepLimits()
        deviations = self.config.spike_deviations
        loss = upper_limit(self.losses, deviations, LEAST_LOSS_DEVIATION * abs(median(self.losses)))
        # Gradient norms vary by factors, not by amounts: their logarithms are what is about normal.
        log_norm = upper_limit([math.log(norm) for norm in self.grad_norms], deviations, LEAST_NORM_DEVIATION)
        # exp of more than 709 overflows.
        return StepLimits(loss=loss, grad_norm=math.exp(min(log_norm, 700.0)))

    def _accept(self, event: "StepEvent") -> None:
        self.in_a_row = 0
        loss, norm = event.report.losses.loss, event.report.grad_norm
        if math.isnan(loss):  # a batch without a label: a NaN in the window would refuse all steps after it
            return
        self.losses = [*self.losses, loss][-self.config.spike_window :]
        # A norm of 0 has no logarithm.
        self.grad_norms = [*self.grad_norms, max(norm, 1e-30)][-self.config.spike_window :]
        # That of the next step's last sample: for other data the window is no measure.
        stage = bisect_right(self.stage_ends, event.samples[1] + self.batch_size - 1)
        if stage != self.stage:
            self._forget()
            self.stage = stage

    def _forget(self) -> None:
        self.losses, self.grad_norms, self.in_a_row = [], [], 0

    def state_dict(self) -> dict[str, Any]:
        """The window, and how many steps in a row were left out."""
        return {
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "in_a_row": self.in_a_row,
            "stage": self.stage,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember again; another batch size has another noise, so its window is not taken over."""
        self._forget()
        if state.get("batch_size") != self.batch_size:
            return
        self.losses, self.grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.in_a_row, self.stage = state["in_a_row"], state["stage"]
