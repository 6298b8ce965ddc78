"""metrics.jsonl: one JSON object a line, for tools and reports."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.files import write_text
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends every step and every validation. On resume, lines of steps that will be done again are dropped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def on_start(self, trainer: "Trainer") -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        if not trainer.context.is_main or not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= trainer.step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Write a line of kind `train`."""
        values = {
            "kind": "train",
            "step": event.step,
            **asdict(event.report.losses),
            "grad_norm": event.report.grad_norm,
            "lr": event.report.lr,
            "tokens": event.tokens,
            "seconds": round(event.seconds, 4),
            "tokens_per_second": round(event.tokens_per_second, 1),
            "memory_mb": round(event.memory_bytes / 1e6, 1),
        }
        self._append(trainer, values)

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Write a line of kind `validation` for each set."""
        for name, report in reports.items():
            self._append(trainer, {"kind": "validation", "step": step, "dataset": name, **asdict(report)})

    def _append(self, trainer: "Trainer", values: dict[str, Any]) -> None:
        if trainer.context.is_main:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
