"""Streams a checkpoint from one format into another: a few tensors in memory, files in parallel, complete or invisible.

All is written into a hidden folder beside the destination, which is renamed when it is whole. Each finished file has a
record there, so the same command goes on after it was killed.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.formats.plain import OutputFile, Piece, Sink, Source
from megachameleon.console import ProgressTask, progress_bar
from megachameleon.files import read_json, require_free_space, require_usable_folder, sync_directory, write_json

JOB_FILE = "conversion.json"
RECORDS = "records"
PARTIAL = ".partial"
LOOK_AT = 1 << 20
"""Values that are checked at a time; what the check needs beside them stays in the processor's cache."""
LOOK_EVERY = 0.25
"""Seconds between looks at how far the files are."""


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
        workers: processes; each holds a few tensors of the model at a time.

    Raises:
        ValueError: `destination` exists, the disk is too small, the source is damaged or holds values that are not
            finite, or what was left by an interrupted conversion belongs to another one.
    """
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: exists already; remove it or choose another destination")
    require_usable_folder(destination)
    folder = temporary_folder(destination)
    files = sink.files()
    with _owned(folder):
        _require_same_job(folder, destination, source, files)
        found = {file.name for file in files if _record_path(folder, file.name).is_file()}
        missing = [file for file in files if file.name not in found]
        needed = sum(file.num_bytes for file in missing)
        require_free_space(folder, needed, "the converted checkpoint")
        checks = source.checks() if missing else []  # bytes that were read before were checked before
        with _executor(min(workers, max(len(missing), len(checks)))) as pool:
            _run(pool, "checking", [(source.check, (name,)) for name in checks])
            jobs: list[tuple[Callable[..., Any], tuple]] = [
                (_write, (source, sink, file, folder)) for file in sorted(missing, key=lambda file: -file.num_bytes)
            ]
            _run(pool, "converting", jobs, folder, missing)
        _complete(folder, destination, sink, files)
    return Conversion(num_files=len(files), num_bytes=sum(file.num_bytes for file in files), files_found=len(found))


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


def _require_same_job(folder: Path, destination: Path, source: Source, files: Sequence[OutputFile]) -> None:
    """Begin, or go on with what was begun."""
    layout = hashlib.sha256(repr(files).encode()).hexdigest()
    job = {"source": str(source.description.origin.absolute()), "identity": source.description.identity}
    job |= {"files": layout}
    path = folder / JOB_FILE
    if path.is_file() and (before := read_json(path)) != job:
        raise ValueError(
            f"{folder}: was left by another conversion to {destination.name}, of {before.get('source')} or with other "
            "options; run that one again, or remove this folder"
        )
    write_json(path, job)
    (folder / RECORDS).mkdir(exist_ok=True)
    _remove_remains(folder, {file.name for file in files if _record_path(folder, file.name).is_file()})


def _remove_remains(folder: Path, finished: set[str]) -> None:
    """Delete what a killed process has begun, so that nothing of it ends up in the destination."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = str(path.relative_to(folder))
        if name not in finished and path.name != JOB_FILE and path.parent != folder / RECORDS:
            path.unlink()


def _write(source: Source, sink: Sink, file: OutputFile, folder: Path) -> None:
    """One file, in a worker; its record is written when it is durable."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with torch.no_grad():
        digests = sink.write(partial, file.pieces, (_made(source, sink, piece) for piece in file.pieces))
    partial.replace(path)
    sync_directory(path.parent)
    write_json(_record_path(folder, file.name), dict(digests))


def _made(source: Source, sink: Sink, piece: Piece) -> Tensor:
    tensor = sink.make(piece, [source.read(cut.name, cut.box) for cut in piece.cuts])
    flat = tensor.reshape(-1)
    count = sum(_not_finite(flat[start : start + LOOK_AT]) for start in range(0, len(flat), LOOK_AT))
    if count:
        raise ValueError(
            f"{source.description.origin}: {count} values of {piece.name} are not finite; a checkpoint with "
            "such weights is of no use: take an earlier one"
        )
    return tensor


def _not_finite(values: Tensor) -> int:
    """How many of them; a sum tells at the speed of memory that there are none, unless it overflows by itself."""
    if bool(values.sum(dtype=torch.float32).isfinite()):
        return 0
    return int((~values.isfinite()).sum())


def _record_path(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name.replace('/', '+')}.json"


def _run(
    pool: Executor,
    what: str,
    jobs: Sequence[tuple[Callable[..., Any], tuple]],
    folder: Path | None = None,
    files: Sequence[OutputFile] = (),
) -> None:
    """Do all jobs behind a progress bar: in files, or in MB of what stands in `folder` already."""
    total = sum(file.num_bytes for file in files) // 1_000_000 if folder else len(jobs)
    if not jobs:
        return
    with progress_bar(f"{what} ({'MB' if folder else 'files'})", total) as bar:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        try:
            _watch(futures, bar, folder, files)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _watch(futures: Sequence[Future], bar: ProgressTask, folder: Path | None, files: Sequence[OutputFile]) -> None:
    seen = 0
    left: set[Future] = set(futures)
    while left:
        done, left = wait(left, timeout=LOOK_EVERY, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        # Sizes on the disk tell how far workers are, without a channel to them.
        now = sum(map(_size, (folder / file.name for file in files))) // 1_000_000 if folder else seen + len(done)
        bar.advance(max(now - seen, 0))
        seen = max(now, seen)


def _size(path: Path) -> int:
    for candidate in (path, path.with_name(path.name + PARTIAL)):
        try:
            return candidate.stat().st_size
        except FileNotFoundError:
            continue
    return 0


def _complete(folder: Path, destination: Path, sink: Sink, files: Sequence[OutputFile]) -> None:
    """Add the small files, make all durable, and rename."""
    sink.finish(folder, {file.name: read_json(_record_path(folder, file.name)) for file in files})
    shutil.rmtree(folder / RECORDS)
    (folder / JOB_FILE).unlink()
    for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        for path in directory.iterdir():
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_directory(directory)
    folder.rename(destination)
    sync_directory(destination.absolute().parent)


def _executor(workers: int) -> Executor:
    """Processes, or a thread where there would be but one."""
    if workers <= 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent is killed, also in the middle of a file."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def digest_of(values: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
