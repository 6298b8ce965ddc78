"""Saving a run's state while it goes on, and finding it again."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megachameleon.checkpoint.background import Background
from megachameleon.checkpoint.folder import (
    LATEST_FILE,
    CheckpointManifest,
    DamagedCheckpointError,
    checkpoint_name,
    complete_checkpoints,
    damaged_checkpoints,
    named_checkpoints,
    parse_manifest,
    resolve_checkpoint,
    step_of,
)
from megachameleon.checkpoint.lineage import Ancestor, Lineage, begin_lineage, versions
from megachameleon.checkpoint.loading import (
    load_checkpoint,
    load_progress,
    require_same_model,
    saved_config,
    saved_vocabulary,
    verify_share,
)
from megachameleon.checkpoint.retention import Retention, delete_after, new_owner, recover, set_aside
from megachameleon.checkpoint.saving import Save, SavedCheckpoint, SaveError, small_files, write_checkpoint
from megachameleon.checkpoint.snapshot import HostMemory, available_memory, live_snapshot
from megachameleon.checkpoint.state import common_state, training_state
from megachameleon.config import RunConfig
from megachameleon.files import require_free_space, write_text
from megachameleon.parallel.context import ParallelContext
from megachameleon.training.batches import TrainingData
from megachameleon.training.lineage import lineage_of, require_same_tokenizers
from megachameleon.training.progress import Progress
from megachameleon.training.step import TrainingState

CHECKPOINT_FOLDER = "checkpoints"
NOTE_SECONDS = 5.0
"""In which the note of a rank that could not write is seen, if it could leave one."""


class Checkpointer:
    """The checkpoints of one run. All ranks call all methods alike."""

    def __init__(self, folder: Path, config: RunConfig, context: ParallelContext, data: TrainingData) -> None:
        self.folder, self.config, self.context, self.data = folder, config, context, data
        self.last: SavedCheckpoint | None = None
        """The newest that became visible; on the main process."""
        self.waited = 0.0
        """Seconds for which the newest `save` held training up."""
        # A token of this start, so that no leftover of another can be taken for a folder of ours.
        self._owner = self._agree(new_owner())
        self._attempts = 0
        self._versions = versions() if context.is_main else {}
        self._lineage: Lineage | None = None
        self._memory = HostMemory(context.device)
        self._writer: Background[SavedCheckpoint | None] = Background("checkpoint")
        self._share: Future[None] | None = None
        """This rank's part of the newest save, until all ranks have met over it."""
        self._finished: list[Path] = []
        self._warned = False

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Save the state after `progress.step` steps. All weights must be in place.

        Returns when this rank's share is copied; with `checkpoint.asynchronous: false`, when it is visible.

        Raises:
            SaveError: the save before this one failed on this rank, or on the main process on any.
        """
        start = time.perf_counter()
        self._let_previous_finish(progress.step)
        tensors = training_state(state.model, state.optimizer, self.context.groups)
        asynchronous = self.config.checkpoint.asynchronous
        self._attempts += 1
        save = Save(
            root=self.folder,
            attempt=f"{self._owner}-{self._attempts}",
            rank=self.context.rank,
            world_size=self.context.world_size,
            # Where training waits, nothing changes meanwhile, so no copy is needed.
            snapshot=self._memory.copy(tensors) if asynchronous else live_snapshot(tensors),
            manifest=self._manifest(progress),
            texts=small_files(self.config, progress.to_dict(), common_state(state.optimizer)),
            retention=Retention(
                keep_last=self.config.checkpoint.keep_last, keep_every=self.config.checkpoint.keep_every
            ),
        )
        self._share = save.durable
        # A thread without collectives: on another rank they could meet those of training in another order.
        self._writer.start(lambda: write_checkpoint(save))
        if not asynchronous:
            self._wait_for_shares()
            self._writer.wait()
        self.waited = time.perf_counter() - start
        self._collect()
        # Only the main process knows that it became visible; the others must not go on before.
        if not asynchronous:
            self.context.barrier()

    def finished(self) -> list[Path]:
        """Checkpoints that have become visible since this was last asked, without waiting; on the main process.

        Raises:
            SaveError: as `save`.
        """
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Return when what all ranks have saved is durable; on the main process: when it is visible.

        Raises:
            SaveError: as `save`.
        """
        self._wait_for_shares()
        self._writer.wait()
        self._collect()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, from which a start of the program goes on; all ranks agree.

        Raises:
            ValueError: there are checkpoints but none is whole, one is of another format, or a rank does not see it.
        """
        self.wait()
        # Only the main process lists, so that a slow file system cannot show ranks different folders.
        names, lost = self._agree(self._list() if self.context.is_main else ([], ""))
        checkpoint = self._first_whole(names)
        if checkpoint is not None and self.context.is_main:
            self._mend_latest(checkpoint)
        if checkpoint is None and (names or lost):
            what = ", ".join(f"{name} is damaged" for name in names) or lost
            raise ValueError(
                f"{self.folder}: this run has had checkpoints, but none is whole ({what}); restore one, or choose "
                "another output_dir (or move this folder away) to start anew"
            )
        return checkpoint

    def newest_before(self, step: int) -> Path | None:
        """The newest whole checkpoint of before a step, if there is one; all ranks agree. Later ones stay as they are.

        Raises:
            ValueError: as `newest`.
        """
        self.wait()
        found = reversed(named_checkpoints(self.folder)) if self.context.is_main else ()
        return self._first_whole(self._agree([path.name for path in found if step_of(path) < step]))

    def load(self, checkpoint: Path, state: TrainingState) -> Progress:
        """Fill weights and optimizer from what `newest` has found."""
        manifest = load_checkpoint(checkpoint, state.model, state.optimizer, self.context, verified=True)
        self._begin_lineage("resume", checkpoint, manifest)
        return Progress.from_dict(load_progress(checkpoint))

    def initialize(self, state: TrainingState) -> None:
        """Take the weights of `checkpoint.init_from`, if it is given: for a run that has no checkpoint yet.

        The optimizer stays as new, but for fp32 copies of the weights, which are taken from the checkpoint's.

        Raises:
            ValueError: it is damaged, or of another model, vocabulary or tokenizer.
        """
        if self.config.checkpoint.init_from is None:
            self._begin_lineage("new", None, None)
            return
        # The main process's choice, since that run may be saving its next checkpoint just now.
        source = Path(self._agree(str(resolve_checkpoint(Path(self.config.checkpoint.init_from)))))
        manifest = parse_manifest(source)
        require_same_model(source, saved_config(source).model, self.config.model)
        saved_vocabulary(source, manifest).require_same(self.data.vocabulary, f"checkpoint {source}", "data.tokenizer")
        require_same_tokenizers(source, manifest.tokenizers, self.data.tokenizers)
        damage = self._agree_on_damage(source)
        if damage is not None:
            raise DamagedCheckpointError(f"checkpoint.init_from: {damage}; name another")
        load_checkpoint(source, state.model, state.optimizer, self.context, verified=True, fresh=True)
        self._begin_lineage("init_from", source, manifest)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, from which a run that was rolled back to `step` must not resume."""
        self.wait()
        if self.context.is_main:
            write_text(self.folder / LATEST_FILE, checkpoint_name(step) + "\n")
            for path in delete_after(self.folder, step, f"{self._owner}-{self._attempts}"):
                self._say(f"{path}: deleted, since the run goes on from step {step}")
        self.context.barrier()

    def require_room(self, ranks_on_host: int = 1) -> None:
        """Refuse to start where the checkpoints that are kept, or the copies in host memory, cannot fit.

        Raises:
            ValueError: names what is needed and what there is.
        """
        fp32 = self.config.training.precision == "fp32"
        size = self.config.model.num_parameters * (12 if fp32 else 14)  # weight, its fp32 master in bf16, two moments
        kept = self.config.checkpoint.keep_last + 1  # one more while the newest is written
        missing = max(kept - len(complete_checkpoints(self.folder)), 1)
        more = "1 more checkpoint" if missing == 1 else f"{missing} more checkpoints"
        require_free_space(self.folder, size * missing, f"writing {more} ({kept} at a time)")
        # Ranks divide the state evenly, and each copies its share.
        needed, free = size * ranks_on_host // self.context.world_size, available_memory()
        if self.config.checkpoint.asynchronous and free is not None and needed > free:
            raise ValueError(
                f"checkpoint.asynchronous: copies of {ranks_on_host} ranks take about {needed / 1e9:.1f} GB of memory, "
                f"and {free / 1e9:.1f} GB of this host are free; set checkpoint.asynchronous=false"
            )

    def _wait_for_shares(self) -> None:
        """Return when all ranks have written, or could not.

        The main process's thread looks for files alone, and would look for those of a dead rank for ever. In a
        collective a dead rank is noticed at once; and none goes on to a step, where waiting counts as hanging much
        sooner, while another still writes.
        """
        if self._share is None:
            return
        error, self._share = self._share.exception(), None
        told: list[Any] = [None] * self.context.world_size
        dist.all_gather_object(told, None if error is None else str(error))
        failed = next(filter(None, told), None)
        if failed and error is None and self.context.is_main:
            self._writer.wait(NOTE_SECONDS)
            if self._writer.busy:  # where not even a note can be left
                raise SaveError(failed)

    def _let_previous_finish(self, step: int) -> None:
        if self._writer.busy and not self._warned and self.context.is_main:
            self._warned = True
            self._say(
                f"{checkpoint_name(step)} is due while the checkpoint before it is still being written; training waits "
                "for it. Raise checkpoint.every (this is said once)"
            )
        self.wait()

    def _manifest(self, progress: Progress) -> CheckpointManifest:
        """That of a checkpoint to be, still without files."""
        if self._lineage is None:
            self._begin_lineage("new", None, None)
        assert self._lineage is not None
        return CheckpointManifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            data_fingerprint=self.data.train.history(progress.consumed_samples),
            versions=self._versions,
            vocabulary=asdict(self.data.vocabulary),
            tokenizers=self.data.tokenizers,
            files={},
            lineage=self._lineage.to_dict(),
        )

    def _begin_lineage(self, kind: Any, source: Path | None, manifest: CheckpointManifest | None) -> None:
        self._lineage = begin_lineage(
            lineage_of(self.data.datasets),
            kind,
            source,
            manifest,
            commit=self._versions.get("commit", ""),
            world_size=self.context.world_size,
        )

    def _collect(self) -> None:
        """Take over what the writer has finished, or raise its error."""
        for saved in self._writer.results():
            if saved is None:
                continue
            assert self._lineage is not None
            parent = Ancestor(
                path=str(saved.path.absolute()), step=step_of(saved.path), manifest_sha256=saved.manifest_sha256
            )
            self._lineage = self._lineage.followed(parent)
            self._finished.append(saved.path)
            copy = (
                f"; copy in host memory of {self._memory.num_bytes / 1e6:,.1f} MB a rank" if self.last is None else ""
            )
            self.last = saved
            self._say(
                f"{saved.path.name}: {saved.num_bytes / 1e6:,.1f} MB saved in {saved.seconds:.2f} s, training waited "
                f"{self.waited:.2f} s{copy}"
            )
            for complaint in saved.complaints:
                self._say(complaint)

    def _list(self) -> tuple[list[str], str]:
        """Names of checkpoints, newest first, and what tells that there have been others."""
        for line in recover(self.folder):
            self._say(line)
        latest = self._read_latest()
        lost = [f"{path.name} was set aside" for path in damaged_checkpoints(self.folder)]
        lost += [f"latest names {latest}"] if latest else []
        return [path.name for path in reversed(named_checkpoints(self.folder))], ", ".join(lost)

    def _read_latest(self) -> str:
        path = self.folder / LATEST_FILE
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""

    def _mend_latest(self, newest: Path) -> None:
        """The folder is right: the pointer is written last, and may be older, or name what was damaged or deleted."""
        latest = self._read_latest()
        if latest != newest.name:
            self._say(f"{self.folder / LATEST_FILE}: names {latest or 'nothing'}; going on from {newest.name}")
            write_text(self.folder / LATEST_FILE, newest.name + "\n")

    def _first_whole(self, names: Sequence[str]) -> Path | None:
        """The first whole one; all ranks compare a share of its bytes with their hashes.

        A damaged one is named, set aside, and the next is taken. Names come from the main process, so that a slow file
        system cannot part the ranks.
        """
        for name in names:
            checkpoint = self.folder / name
            damage = self._agree_on_damage(checkpoint)
            if damage is None:
                return checkpoint
            if self.context.is_main:
                self._say(f"{damage}; set aside as {set_aside(checkpoint).name}, looking for the one before it")
        return None

    def _agree_on_damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's bytes, the same on all ranks; None: nothing.

        Raises:
            ValueError: on all ranks, if one cannot tell.
        """
        found: list[Any] = [None] * self.context.world_size
        dist.all_gather_object(found, examine(checkpoint, self.context))
        # Unusable before damaged: while a rank cannot read at all, nothing is set aside.
        for kind, text in sorted(filter(None, found), key=lambda item: item[0] == "damaged"):
            if kind == "damaged":
                return text
            raise ValueError(text)
        return None

    def _agree(self, value: Any) -> Any:
        """The main process's value, on all."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def _say(self, line: str) -> None:
        if self.context.is_main:
            print(line, file=sys.stderr, flush=True)


def examine(checkpoint: Path, context: ParallelContext) -> tuple[str, str] | None:
    """What this rank finds wrong with its share of a checkpoint: (`damaged` or `unusable`, why); None: nothing.

    Only bytes that differ are damage. A file system that does not answer is not: setting a good checkpoint aside for it
    would lose work.
    """
    try:
        if not checkpoint.is_dir():
            return "unusable", (
                f"output_dir: process {context.rank} does not see {checkpoint}; it must be on a file system that all "
                "nodes share"
            )
        verify_share(checkpoint, parse_manifest(checkpoint), context)
    except DamagedCheckpointError as error:
        return "damaged", str(error)
    except ValueError as error:
        return "unusable", str(error)
    except OSError as error:
        return "unusable", (
            f"{error.filename or checkpoint}: process {context.rank} cannot read it ({error.strerror}); mend that, or "
            f"rename {checkpoint.name} to go on from the checkpoint before it"
        )
    return None
