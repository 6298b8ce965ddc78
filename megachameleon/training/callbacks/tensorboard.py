"""Scalars and drawn pictures to TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megachameleon.training.callbacks.scalar_log import ScalarLog
from megachameleon.training.callbacks.throughput import Throughput

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard(ScalarLog):
    """`purge_step` hides what an interrupted run wrote after its last checkpoint."""

    def __init__(self, throughput: Throughput, folder: Path) -> None:
        super().__init__(throughput)
        self.folder = folder / TENSORBOARD_FOLDER
        self.writer: Any = None

    def open(self, trainer: "Trainer") -> None:
        """Open the writer."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_pictures(self, prompts: Sequence[str], pictures: Sequence[Any], step: int) -> None:
        """Pictures."""
        for prompt, picture in zip(prompts, pictures, strict=True):
            self.writer.add_image(f"drawn/{prompt}", np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()
