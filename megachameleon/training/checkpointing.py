"""Saving a run's state while it goes on, and finding it again."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megachameleon.checkpoint.folder import MANIFEST_FILE, complete_checkpoints
from megachameleon.checkpoint.loading import load_checkpoint, load_progress
from megachameleon.checkpoint.saving import save_checkpoint
from megachameleon.config import RunConfig
from megachameleon.parallel.context import ParallelContext
from megachameleon.training.batches import TrainingData
from megachameleon.training.progress import Progress
from megachameleon.training.step import TrainingState

CHECKPOINT_FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one run. All ranks call all methods alike, except `finished`."""

    def __init__(self, folder: Path, config: RunConfig, context: ParallelContext, data: TrainingData) -> None:
        self.folder, self.config, self.context, self.data = folder, config, context, data
        self._finished: list[Path] = []

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Save the state after `progress.step` steps. All weights must be in place."""
        path = save_checkpoint(
            self.folder,
            state.model,
            state.optimizer,
            self.config,
            self.data.vocabulary,
            self.context,
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            data_fingerprint=self.data.train.history(progress.consumed_samples),
            tokenizers=self.data.tokenizers,
            progress=progress.to_dict(),
        )
        self._finished.append(path)

    def finished(self) -> list[Path]:
        """Checkpoints that have become visible since this was last asked."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Return when everything that was saved is durable and visible."""

    def newest(self) -> Path | None:
        """The newest complete checkpoint. The main process chooses, so that a slow file system cannot part the ranks.

        Raises:
            ValueError: a rank does not see it.
        """
        found = complete_checkpoints(self.folder) if self.context.is_main else []
        choice: list[Any] = [found[-1].name if found else None]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is None:
            return None
        checkpoint = self.folder / choice[0]
        if not (checkpoint / MANIFEST_FILE).is_file():
            raise ValueError(
                f"output_dir: process {self.context.rank} does not see {checkpoint}; "
                "output_dir must be on a file system that all nodes share"
            )
        return checkpoint

    def load(self, checkpoint: Path, state: TrainingState) -> Progress:
        """Fill weights and optimizer."""
        load_checkpoint(checkpoint, state.model, state.optimizer, self.context)
        return Progress.from_dict(load_progress(checkpoint))
