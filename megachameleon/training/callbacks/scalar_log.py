"""What TensorBoard, Weights & Biases and MLflow have in common: numbers and pictures by name and step."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.callbacks.throughput import Throughput
from megachameleon.training.callbacks.values import grouped, step_values
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class ScalarLog(Callback):
    """Says what is logged and when; subclasses say where. Only the main process logs."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def open(self, trainer: "Trainer") -> None:
        """Get ready, before the first step."""
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers, all finite, by `group/name`."""
        raise NotImplementedError

    def log_pictures(self, prompts: Sequence[str], pictures: Sequence[Any], step: int) -> None:
        """Pictures (PIL) that were drawn for prompts."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last step, or after an error."""
        raise NotImplementedError

    def on_start(self, trainer: "Trainer") -> None:
        """Open."""
        if trainer.context.is_main:
            self.open(trainer)

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Every `training.log_every` steps, and at steps with more than the usual measurements."""
        logging, training = trainer.config.logging, trainer.config.training
        if trainer.context.is_main and not (event.step % training.log_every and event.step % logging.monitor_every):
            self.log(grouped(step_values(event, self.throughput)), event.step)

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Losses of each set."""
        if trainer.context.is_main:
            for name, report in reports.items():
                self.log(grouped({f"validation_{name}/{key}": value for key, value in asdict(report).items()}), step)

    def on_drawing(
        self,
        trainer: "Trainer",
        step: int,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        values: dict[str, float],
    ) -> None:
        """Pictures, and how evenly they use the codes."""
        if trainer.context.is_main:
            self.log(grouped(values), step)
            self.log_pictures(prompts, pictures, step)

    def on_end(self, trainer: "Trainer") -> None:
        """Close."""
        if trainer.context.is_main:
            self.close()
