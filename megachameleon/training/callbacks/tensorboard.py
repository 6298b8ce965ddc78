"""Scalars to TensorBoard."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Rank 0 writes; `purge_step` hides what an interrupted run wrote after its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / TENSORBOARD_FOLDER
        self.writer: Any = None

    def on_start(self, trainer: "Trainer") -> None:
        """Open the writer."""
        if trainer.context.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Losses, gradient norm, learning rate and speed."""
        if self.writer is None or event.step % trainer.config.training.log_every:
            return
        values = {
            **{f"train/{name}": value for name, value in asdict(event.report.losses).items()},
            "train/grad_norm": event.report.grad_norm,
            "train/lr": event.report.lr,
            "speed/tokens_per_second": event.tokens_per_second,
            "speed/memory_mb": event.memory_bytes / 1e6,
        }
        self._add(values, event.step)

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Losses of each validation set."""
        if self.writer is not None:
            for name, report in reports.items():
                self._add({f"validation_{name}/{key}": value for key, value in asdict(report).items()}, step)
            self.writer.flush()

    def on_end(self, trainer: "Trainer") -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()

    def _add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, step)
