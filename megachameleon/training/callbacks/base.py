"""The events of a run that callbacks may listen to. All processes call them; each callback decides who acts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megachameleon.training.health.guards import Verdict
from megachameleon.training.losses import LossReport
from megachameleon.training.step import StepReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """A finished step."""

    step: int
    """Optimizer steps done, this one included."""
    report: StepReport
    """The same on all ranks."""
    seconds: float
    """Wall time of the step."""
    samples: tuple[int, int]
    """Positions of the blend that were read: first, and the one after the last."""
    tokens: int
    """Sequence positions read since the start of the run, by all ranks."""
    tokens_per_second: float
    """Of all ranks together."""
    memory_bytes: int
    """Peak memory of this process."""


class Callback:
    """Does nothing; subclasses override what they need."""

    name = ""
    """Under which its state is saved in checkpoints; empty: it has none."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """After each step."""

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """After a validation, with the losses of each set."""

    def on_drawing(
        self,
        trainer: "Trainer",
        step: int,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        values: dict[str, float],
    ) -> None:
        """When pictures (PIL) were drawn for prompts at a validation, with what there is to say of their codes."""

    def on_checkpoint(self, trainer: "Trainer", step: int, path: str) -> None:
        """When a checkpoint has become visible; on the main process only."""

    def on_trouble(self, trainer: "Trainer", event: StepEvent, verdict: Verdict) -> None:
        """When a step was skipped or a guard has something to say, before anything is done about it."""

    def on_end(self, trainer: "Trainer") -> None:
        """When the loop ends, also by an error."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers over a resume, as JSON; taken from the main process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember again."""
