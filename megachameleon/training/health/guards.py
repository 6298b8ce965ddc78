"""What a guard is: it follows the reports of a run, bounds the next step, and says what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megachameleon.training.agreement import StepLimits

if TYPE_CHECKING:
    from megachameleon.training.callbacks.base import StepEvent

Action = Literal["continue", "lower_lr", "rollback", "stop"]
SEVERITY: tuple[Action, ...] = ("continue", "lower_lr", "rollback", "stop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a guard wants after a step."""

    action: Action = "continue"
    """What is to be done; of several guards the gravest wins."""
    reason: str = ""
    """Empty: nothing to say. Otherwise it is logged as it is, whatever the action, so it names the step."""
    since: int | None = None
    """The first step of the trouble, counted from 1: a roll-back takes a checkpoint of before it. None: this step."""
    lr_scale: float = 1.0
    """What `lower_lr`, and a roll-back after it has loaded, multiply the learning rate of the run so far by."""


class Guard:
    """Accepts everything; subclasses override. A function of the reports alone, which are the same on all ranks."""

    name = "guard"

    def limits(self) -> StepLimits:
        """The largest loss and gradient norm with which the next step may update."""
        return StepLimits()

    def judge(self, event: "StepEvent") -> Verdict:
        """What to do after a step, which may have been skipped (`event.report.skipped`)."""
        return Verdict()

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember again."""


def tightest(limits: Sequence[StepLimits]) -> StepLimits:
    """The limits that satisfy all guards."""
    return StepLimits(
        loss=min((limit.loss for limit in limits), default=float("inf")),
        grad_norm=min((limit.grad_norm for limit in limits), default=float("inf")),
    )


def gravest(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest action, with the reasons of all that have one, and the earliest beginning of those who want it."""
    action: Action = max((verdict.action for verdict in verdicts), key=SEVERITY.index, default="continue")
    wanting = [verdict for verdict in verdicts if verdict.action == action]
    return Verdict(
        action=action,
        reason="; ".join(verdict.reason for verdict in verdicts if verdict.reason),
        since=min((verdict.since for verdict in wanting if verdict.since is not None), default=None),
        lr_scale=min((verdict.lr_scale for verdict in wanting), default=1.0),
    )
