"""metrics.jsonl: one JSON object a line, for tools and reports."""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.files import no_room_named, write_text
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.callbacks.throughput import Throughput
from megachameleon.training.callbacks.values import step_values
from megachameleon.training.health.guards import Verdict
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends every step, validation, drawing and trouble. On resume, lines of steps that will be done again are
    dropped, except those of trouble, which tell why."""

    def __init__(self, throughput: Throughput, folder: Path) -> None:
        self.throughput, self.path = throughput, folder / METRICS_FILE

    def on_start(self, trainer: "Trainer") -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        if not trainer.context.is_main or not self.path.exists():
            return
        # Else a step that is done again would stand in the file twice.
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= trainer.step]
        with self._no_room_named():
            write_text(self.path, "".join(line + "\n" for line in kept))

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Write a line of kind `train`."""
        values = {"kind": "train", "step": event.step, **step_values(event, self.throughput)}
        self._append(trainer, values | ({"skipped": event.report.skipped} if event.report.skipped else {}))

    def on_trouble(self, trainer: "Trainer", event: StepEvent, verdict: Verdict) -> None:
        """Write a line of kind `trouble`, with the samples that were read."""
        values = {"kind": "trouble", "step": event.step, "action": verdict.action, "reason": verdict.reason}
        self._append(trainer, {**values, "skipped": event.report.skipped, "samples": list(event.samples)})

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Write a line of kind `validation` for each set."""
        for name, report in reports.items():
            self._append(trainer, {"kind": "validation", "step": step, "dataset": name, **asdict(report)})

    def on_drawing(
        self,
        trainer: "Trainer",
        step: int,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        values: dict[str, float],
    ) -> None:
        """Write a line of kind `drawing`."""
        self._append(trainer, {"kind": "drawing", "step": step, "pictures": len(pictures), **values})

    def _append(self, trainer: "Trainer", values: dict[str, Any]) -> None:
        if trainer.context.is_main:
            # JSON knows neither NaN nor infinity, and Python would write them all the same.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self._no_room_named(), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")

    def _no_room_named(self) -> AbstractContextManager[None]:
        remedy = "the last checkpoint is whole: free some room, then run the same command again"
        return no_room_named(self.path, who="rank 0", remedy=remedy)


def _step_of(line: str) -> float:
    """The step of a line; 0 for trouble, which stays, and infinite for a line that a crash cut short."""
    try:
        values = json.loads(line)
        return 0 if values["kind"] == "trouble" else values["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
