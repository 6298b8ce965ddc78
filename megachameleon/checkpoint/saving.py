"""Writing a checkpoint from the snapshots of all ranks, without any of them waiting for another in a collective.

Each rank writes its file and then, when that is durable, a small record of it. The main process waits until the shared
file system shows the records of all ranks, adds what is common, and publishes. All of it can run in a thread beside
training: files are the only thing by which ranks meet here.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megachameleon.checkpoint.folder import (
    COMMON_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    PROGRESS_FILE,
    CheckpointManifest,
    checkpoint_name,
    write_manifest,
)
from megachameleon.checkpoint.retention import Retention, delete_old, hidden_folder, put_in_place
from megachameleon.checkpoint.snapshot import Snapshot, write_snapshot
from megachameleon.checkpoint.tensors import index_from_json, index_of, index_to_json, merge_indexes
from megachameleon.config import RunConfig, to_yaml
from megachameleon.files import NO_ROOM, read_json, sha256_of, to_json, write_json, write_text

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
"""Seconds between looks for the records of other ranks."""
REASONS = {
    **NO_ROOM,
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "its folder has been taken away",
    errno.ENOTDIR: "a part of its path is no folder",
}


class SaveError(ValueError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint to write, as one rank sees it. Nothing in it changes while training goes on."""

    root: Path
    """Folder of the run's checkpoints."""
    attempt: str
    """The same on all ranks and never used before, so that no file of a dead attempt is taken for one of this."""
    rank: int
    """Of this process; 0 is the main one."""
    world_size: int
    """Processes that write."""
    snapshot: Snapshot
    """This rank's share."""
    manifest: CheckpointManifest
    """Without its files; used by the main process only, as are the next two."""
    texts: dict[str, str]
    """Small files by name."""
    retention: Retention
    """What the main process deletes afterwards."""
    durable: Future[None] = field(default_factory=Future)
    """Of this rank's share: done when it is on the disk, or with the error for which it is not."""

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return hidden_folder(self.root, self.manifest.step, self.attempt, "tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that has become visible."""

    path: Path
    """Its folder, by its final name."""
    seconds: float
    """From the snapshot on."""
    num_bytes: int
    """Of all files but the manifest."""
    manifest_sha256: str
    """In hexadecimal."""
    complaints: tuple[str, ...] = ()
    """About older checkpoints that could not be deleted."""


def small_files(config: RunConfig, progress: dict[str, Any], common: dict[str, int]) -> dict[str, str]:
    """The texts of a checkpoint besides index and manifest, by file name."""
    return {CONFIG_FILE: to_yaml(config), PROGRESS_FILE: to_json(progress), COMMON_FILE: to_json(common)}


def write_checkpoint(save: Save) -> SavedCheckpoint | None:
    """Write this rank's share and, on the main process, the rest; returns what is visible now (main process only).

    Raises:
        SaveError: this rank, or on the main process any rank, could not write. What this rank wrote is removed.
    """
    start = time.perf_counter()
    with _cleaning_up(save):
        write_share(save)
        if save.rank:
            return None
        path, num_bytes = publish(save)
    # only when the new one is visible
    complaints = delete_old(save.root, save.retention, save.attempt)
    return SavedCheckpoint(
        path=path,
        seconds=time.perf_counter() - start,
        num_bytes=num_bytes,
        manifest_sha256=sha256_of(path / MANIFEST_FILE),
        complaints=tuple(complaints),
    )


def write_share(save: Save) -> None:
    """Write this rank's tensors, then the record that says so."""
    try:
        save.folder.mkdir(parents=True, exist_ok=True)
        name = _part_name(save.rank)
        written = write_snapshot(save.folder / name, save.snapshot)
        index = index_to_json(index_of(save.snapshot.tensors, name))
        # after the share is durable: the record is what the main process waits for
        write_json(save.folder / _record_name(save.rank), {"name": name, **written, "index": index})
    except BaseException as error:
        # in plain words: the main thread raises it where it waits
        save.durable.set_exception(_in_words(save, error))
        raise
    save.durable.set_result(None)


def publish(save: Save) -> tuple[Path, int]:
    """Wait for all ranks, complete the folder and make it visible; returns it and its bytes.

    Raises:
        SaveError: another rank could not write its share.
    """
    _wait_for_records(save)
    paths = [save.folder / _record_name(rank) for rank in range(save.world_size)]
    records = [read_json(path) for path in paths]
    files = {record["name"]: {"size": record["size"], "sha256": record["sha256"]} for record in records}
    index = merge_indexes(
        index_from_json(record["index"], str(path)) for record, path in zip(records, paths, strict=True)
    )
    write_json(save.folder / INDEX_FILE, index_to_json(index))
    for name, text in save.texts.items():
        write_text(save.folder / name, text)
    for name in (INDEX_FILE, *save.texts):
        path = save.folder / name
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for path in paths:
        path.unlink()
    # last: from here on the checkpoint is complete, whatever its name
    write_manifest(save.folder, replace(save.manifest, files=dict(sorted(files.items()))))
    final = put_in_place(save.folder, save.root, save.manifest.step, save.attempt)
    return final, sum(file["size"] for file in files.values())


def _wait_for_records(save: Save) -> None:
    """Return when all ranks' records are there.

    The folder is listed anew each time: NFS answers a question about a file that was missing from its cache for up to a
    minute, while opening a folder makes it ask the server.
    """
    wanted = {_record_name(rank) for rank in range(save.world_size)}
    pause = FIRST_PAUSE
    while True:
        found = {path.name for path in save.folder.iterdir()}
        failed = sorted(name for name in found if name.startswith("failed_"))
        if failed:
            raise SaveError(read_json(save.folder / failed[0])["reason"])
        if wanted <= found:
            return
        time.sleep(pause)
        # thousands of looks a second would load a shared file system
        pause = min(1.5 * pause, LONGEST_PAUSE)


@contextlib.contextmanager
def _cleaning_up(save: Save) -> Iterator[None]:
    """Remove what this rank has written if it fails, tell the main process, and say it in one line."""
    try:
        yield
    except (OSError, SaveError) as error:
        said = _in_words(save, error)
        if save.rank:
            _leave_note(save, str(said))
        else:
            shutil.rmtree(save.folder, ignore_errors=True)
        raise said from None


def _leave_note(save: Save, reason: str) -> None:
    """A failed rank's last word. If not even that can be written, the rank's own error has to do."""
    for name in (_part_name(save.rank), _record_name(save.rank)):
        with contextlib.suppress(OSError):
            (save.folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        if save.folder.is_dir():
            write_json(save.folder / f"failed_{save.rank:05d}.json", {"reason": reason})


def _in_words(save: Save, error: BaseException) -> SaveError:
    if isinstance(error, SaveError):
        return error
    name, reason = _part_name(save.rank), f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno:
        name = Path(error.filename or name).name
        reason = f"{REASONS.get(error.errno, os.strerror(error.errno))} ({error.strerror})"
    return SaveError(
        f"{save.root}: rank {save.rank} cannot write {name} of {checkpoint_name(save.manifest.step)}, {reason}; "
        "earlier checkpoints are as they were: mend this, then run the same command again"
    )


def _part_name(rank: int) -> str:
    return f"tensors_{rank:05d}.safetensors"


def _record_name(rank: int) -> str:
    return f"record_{rank:05d}.json"
