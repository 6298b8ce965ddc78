"""Files that are either whole or absent: atomic writes, hashes, room on the disk."""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not grow so"}
MOST_JSON_BYTES = 1 << 30
"""The largest of ours is a checkpoint's index, which has an entry for each tensor of each rank."""


class NoRoomError(ValueError):
    """Nothing more can be written; going on with other work would be in vain."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    Two processes, also of two machines, may write the same path at once: each has its own temporary name, and the last
    rename wins whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            # Before the rename: else a crash of the machine may leave the new name with old or no bytes.
            os.fsync(file.fileno())
        _let_others_read(temporary)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _let_others_read(path: Path) -> None:
    """Let those read a file who may read its folder; some writers (safetensors) keep it to its owner."""
    path.chmod(path.stat().st_mode | (path.parent.stat().st_mode & 0o044))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` whole or not at all."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Indented JSON, equal for equal values."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is missing, is not a file of at most 1 GiB, or is not JSON.
    """
    try:
        # A pipe would be waited for without end, a sparse file would fill all memory.
        is_readable = path.is_dir() or (path.is_file() and path.stat().st_size <= MOST_JSON_BYTES)
        if path.exists() and not is_readable:
            raise ValueError(f"no file of at most {MOST_JSON_BYTES:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, lists in too many lists
        raise ValueError(f"{path}: not valid JSON ({error}); write the file again") from None


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_usable_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, without making it.

    Raises:
        ValueError: it, or what should hold it, is a file or may not be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a file" if not existing.is_dir() else "may not be written"
        raise ValueError(f"{folder}: cannot be used as a folder, because {existing} {what}; choose another")


def require_free_space(directory: Path, num_bytes: int, purpose: str) -> None:
    """Refuse to start work that the disk cannot hold.

    Raises:
        ValueError: less than `num_bytes` are free where `directory` is or will be.
    """
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(
            f"{directory}: {purpose} needs about {num_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "free some room or choose another folder"
        )


@contextmanager
def no_room_named(
    path: Path, *, who: str = "", remedy: str = "finished units stay: free some room and run again"
) -> Iterator[None]:
    """Turn the system's errors of full disks into one that says what to do.

    Args:
        path: what is written, or how the names of files begin.
        who: writes it, where there are several, such as `rank 3`.
        remedy: what is lost, and what to do.

    Raises:
        NoRoomError: in place of such errors.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        cannot = f"{who} cannot write" if who else "cannot write"
        raise NoRoomError(
            f"{path.parent}: {cannot} {path.name}, {NO_ROOM[error.errno]} ({error.strerror}); {remedy}"
        ) from None
