"""Streams a checkpoint from one format into another: a few tensors in memory, files in parallel, complete or invisible.

All is written into a hidden folder beside the destination, which is renamed when it is whole. Each finished file has a
record there, so the same command goes on after it was killed. The source's hashes are compared beside the conversion:
what was made of bytes that nobody has checked yet stays invisible, and is not taken up again.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box
from megachameleon.checkpoint.folder import DamagedCheckpointError
from megachameleon.checkpoint.formats.jobs import Job, Meter, run_jobs
from megachameleon.checkpoint.formats.plain import Cut, KnownHash, OutputFile, Piece, Sink, Source
from megachameleon.files import (
    no_room_named,
    read_json,
    require_free_space,
    require_usable_folder,
    sync_directory,
    write_json,
)

JOB_FILE = "conversion.json"
RECORDS = "records"
CHECKED = "checked"
PARTIAL = ".partial"
STRIDE = 1 << 20
"""Bytes of the source that are read and hashed at a time, while they are in the processor's cache."""
BLOCK = 16 << 20
"""Bytes of a matrix that are made at a time; the C library maps and unmaps what is larger than 32 MiB each time."""
GOES_ON = "finished files stay: free some room, and the same command goes on"
LOOK_AT = 1 << 20
"""Values that are counted at a time where some are not finite; what that needs beside them stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What has been written."""

    num_files: int
    num_bytes: int
    """In them."""
    files_found: int
    """Of them an interrupted conversion had finished."""


def temporary_folder(destination: Path) -> Path:
    """Where a conversion works until it is whole."""
    return destination.with_name(f".{destination.name}.converting")


def convert(source: Source, sink: Sink, destination: Path, *, workers: int = 1) -> Conversion:
    """Write `source` into the folder `destination` by `sink`; called again after a kill, it goes on.

    Args:
        workers: threads; each holds a few tensors of the model at a time.

    Raises:
        ValueError: `destination` exists, the disk is too small, the source is damaged or holds values that are not
            finite, or what was left by an interrupted conversion belongs to another one.
    """
    _require_new(destination)
    require_usable_folder(destination)
    folder = temporary_folder(destination)
    files, hashes = sink.files(), source.hashes()
    with _owned(folder):
        _require_new(destination)  # again, since another conversion may have ended in between
        found = _finished_before(folder, destination, source, files, hashes)
        missing = [file for file in files if file.name not in found]
        require_free_space(folder, sum(file.num_bytes for file in missing), "the converted checkpoint")
        try:
            _do(source, sink, missing, hashes if missing else [], folder, workers)
        except DamagedCheckpointError:
            shutil.rmtree(folder)  # nothing made of it is of use
            raise
        _complete(folder, destination, sink, files)
    return Conversion(num_files=len(files), num_bytes=sum(file.num_bytes for file in files), files_found=len(found))


def _require_new(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: exists already; remove it or choose another destination")


def _do(
    source: Source, sink: Sink, files: Sequence[OutputFile], hashes: Sequence[KnownHash], folder: Path, workers: int
) -> None:
    """Checks come first, so that damage is seen soon and little is lost to a kill before all is checked."""
    checks: list[Job] = [partial(_check, known, folder) for known in hashes]
    large_first = sorted(files, key=lambda file: -file.num_bytes)
    writes: list[Job] = [partial(_write, source, sink, file, folder) for file in large_first]
    to_read = sum(known.path.stat().st_size for known in hashes)
    run_jobs(
        checks + writes,
        workers=workers,
        what="checking and converting" if checks else "converting",
        num_bytes=to_read + sum(file.num_bytes for file in files),
    )


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Keep a second conversion to the same place out; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another conversion is writing there; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _finished_before(
    folder: Path, destination: Path, source: Source, files: Sequence[OutputFile], hashes: Sequence[KnownHash]
) -> set[str]:
    """Begin, or go on with what was begun: the files that need not be written again."""
    layout = hashlib.sha256(repr(files).encode()).hexdigest()
    job = {"source": str(source.description.origin.absolute()), "identity": source.description.identity}
    job |= {"files": layout}
    path = folder / JOB_FILE
    if path.is_file() and (before := read_json(path)) != job:
        _require_nothing_finished(folder, destination, before)
        shutil.rmtree(folder / CHECKED, ignore_errors=True)  # of another source
    write_json(path, job)
    if not all(_checked_path(folder, known).is_file() for known in hashes):
        shutil.rmtree(folder / RECORDS, ignore_errors=True)
    for name in (RECORDS, CHECKED):
        (folder / name).mkdir(exist_ok=True)
    # Without power a record may outlast its file: a folder that was new is not on the disk with what is in it.
    finished = {
        file.name for file in files if _record_path(folder, file.name).is_file() and (folder / file.name).is_file()
    }
    _remove_remains(folder, finished)
    return finished


def _require_nothing_finished(folder: Path, destination: Path, before: dict[str, str]) -> None:
    """Refuse to throw away what another conversion has done; one that was refused or killed early has done nothing."""
    if any((folder / RECORDS).glob("*.json")):
        raise ValueError(
            f"{folder}: was left by another conversion to {destination.name}, of {before.get('source')} as it was then "
            "or with other options; run that one again, or remove this folder"
        )


def _remove_remains(folder: Path, finished: set[str]) -> None:
    """Delete what a killed process has begun, so that nothing of it ends up in the destination."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = str(path.relative_to(folder))
        if name not in finished and path.name != JOB_FILE and path.parent not in (folder / RECORDS, folder / CHECKED):
            path.unlink()


def _check(known: KnownHash, folder: Path, meter: Meter) -> None:
    """Compare a file of the source with its hash."""
    digest, data = hashlib.new(known.algorithm), memoryview(bytearray(STRIDE))
    with known.path.open("rb", buffering=0) as file:
        while size := file.readinto(data):
            digest.update(data[:size])
            meter.add(size)
    if digest.hexdigest() != known.digest:
        name = known.algorithm.upper().replace("SHA", "SHA-")
        raise DamagedCheckpointError(
            f"{known.path}: its {name} differs from that in {known.said_by}; the checkpoint is damaged: copy it again"
        )
    _checked_path(folder, known).touch()


def _write(source: Source, sink: Sink, file: OutputFile, folder: Path, meter: Meter) -> None:
    """One file; its record is written when it is durable."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + PARTIAL)
    with torch.no_grad(), no_room_named(unfinished, remedy=GOES_ON):
        blocks = (block for piece in file.pieces for block in _blocks(piece, source.description.model.head_dim))
        digests = sink.write(unfinished, file.pieces, (_made(source, sink, block, meter) for block in blocks))
    unfinished.replace(path)
    sync_directory(path.parent)
    write_json(_record_path(folder, file.name), dict(digests))


def _blocks(piece: Piece, head_dim: int) -> Iterator[Piece]:
    """A large matrix by rows of whole heads, since memory that is small enough is used again and not given back."""
    box = piece.cuts[0].box if len(piece.cuts) == 1 else None
    if box is None or len(box.shape) != 2 or piece.shape[-2:] != box.shape:
        yield piece
        return
    rows = max(BLOCK // (box.shape[1] * piece.dtype.itemsize) // head_dim, 1) * head_dim
    for start in range(0, box.shape[0], rows):
        shape = (min(rows, box.shape[0] - start), box.shape[1])
        part = Box((box.offset[0] + start, box.offset[1]), shape)
        yield replace(piece, shape=(*piece.shape[:-2], *shape), cuts=(Cut(name=piece.cuts[0].name, box=part),))


def _made(source: Source, sink: Sink, piece: Piece, meter: Meter) -> Tensor:
    tensor = sink.make(piece, [source.read(cut.name, cut.box) for cut in piece.cuts])
    if count := _not_finite(tensor):
        raise ValueError(
            f"{source.description.origin}: {count} values of {piece.name} are not finite; a checkpoint with "
            "such weights is of no use: take an earlier one"
        )
    meter.add(tensor.nbytes)
    return tensor


def _not_finite(values: Tensor) -> int:
    """How many of them; a sum tells at the speed of memory that there are none, unless it overflows by itself."""
    if bool(values.sum().isfinite()):
        return 0
    flat = values.reshape(-1)
    return sum(int((~flat[start : start + LOOK_AT].isfinite()).sum()) for start in range(0, len(flat), LOOK_AT))


def _record_path(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name.replace('/', '+')}.json"


def _checked_path(folder: Path, known: KnownHash) -> Path:
    return folder / CHECKED / f"{known.path.name}.{known.digest}"


def _complete(folder: Path, destination: Path, sink: Sink, files: Sequence[OutputFile]) -> None:
    """Add the small files, make all durable, and rename."""
    sink.finish(folder, {file.name: read_json(_record_path(folder, file.name)) for file in files})
    shutil.rmtree(folder / RECORDS)
    shutil.rmtree(folder / CHECKED)
    (folder / JOB_FILE).unlink()
    for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        for path in directory.iterdir():
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_directory(directory)
    folder.rename(destination)
    sync_directory(destination.absolute().parent)
