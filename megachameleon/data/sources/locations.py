"""Where sources lie: local paths, or URLs of any file system that fsspec knows (s3://, gs://, https://, memory://).

A source is named by a string. Local files are opened directly; fsspec is imported only for URLs.
"""

import errno
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

BUFFER_BYTES = 1 << 20
MAX_NAME = 4096
"""Longest name of a picture beside a file, in characters."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# everything else, such as a stale handle or no permission, is not "no file" and must be seen
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_URL_AS_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def source_name(source: str | Path) -> str:
    """A source as a string: `file://` URLs as local paths, and the slash that `Path` takes from a URL given back."""
    name = str(source)
    # Path("s3://a") has become "s3:/a"
    if isinstance(source, Path):
        name = _URL_AS_PATH.sub(r"\1://", name, count=1)
    if name.startswith("file://"):
        name = "/" + name.removeprefix("file://").lstrip("/")
    return name


def absolute_source(source: str | Path) -> str:
    """The name that means the same from any working folder: local paths resolved, URLs as they are."""
    name = source_name(source)
    return name if is_url(name) else str(Path(name).resolve())


def is_url(source: str) -> bool:
    """Whether a source lies behind fsspec."""
    return _URL.match(source) is not None


def base_name(source: str) -> str:
    """The last part of a path or URL, without the query of a URL."""
    # only there: object stores allow ? and # in names
    path = re.split("[?#]", source)[0] if source.startswith(("http://", "https://")) else source
    return path.rstrip("/").rpartition("/")[2]


@lru_cache(maxsize=16)
def folder_of(source: str) -> str:
    """The folder of a path or URL; remembered, because it is asked for each record."""
    return posixpath.dirname(source) if is_url(source) else str(Path(source).parent)


def inside(folder: str, name: str) -> str:
    """`name` below `folder`, for names that were found there."""
    return f"{folder.rstrip('/')}/{name}"


def resolve_beside(folder: str, name: str) -> str:
    """The file that a record names relative to `folder`; for local files, links are followed first.

    Raises:
        ValueError: not a file name, or outside the folder.
    """
    if len(name) > MAX_NAME:
        raise ValueError(f"image {name[:40]!r}... is no file name; content in base64 belongs under image_base64")
    if not name or any(ord(character) < 32 for character in name):
        raise ValueError(f"image {name!r} is not a file name")
    if is_url(folder):
        # links cannot be followed in a URL, so only the name itself can be checked
        path = posixpath.normpath(name)
        if is_url(name) or path.startswith(("/", "..")) or "\\" in name:
            raise ValueError(f"image {name!r} lies outside the folder of the file that names it")
        return inside(folder, path)
    local = Path(os.path.realpath(Path(folder, name)))  # unlike Path.resolve, no error where links go in a circle
    if not local.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"image {name!r} lies outside the folder of the file that names it")
    return str(local)


@contextmanager
def open_location(source: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes.

    Raises:
        ValueError: a URL that cannot be opened, or whose file system is not installed.
        OSError: a local file that cannot be opened.
    """
    if not is_url(source):
        with Path(source).open("rb", buffering=BUFFER_BYTES) as local:
            yield local
        return
    with _told_with_url(source):
        system, path = _file_system(source)
        remote = system.open(path, "rb")
    with remote:
        yield cast(BinaryIO, remote)


def file_size(source: str) -> int | None:
    """Bytes of a file, 0 if its server does not tell; None if no file is there.

    Raises:
        ValueError: a URL whose file system is not installed or cannot be reached.
    """
    if not is_url(source):
        try:
            status = Path(source).stat()
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    with _told_with_url(source):
        system, path_there = _file_system(source)
        try:
            entry = system.info(path_there)
        except FileNotFoundError:
            return None
        return None if entry.get("type") == "directory" else int(entry.get("size") or 0)


def is_folder(source: str) -> bool:
    """Whether a folder is there.

    Raises:
        ValueError: a URL whose file system is not installed or cannot be reached.
    """
    if not is_url(source):
        return Path(source).is_dir()
    with _told_with_url(source):
        system, path = _file_system(source)
        return bool(system.isdir(path))


def list_folder(folder: str, *, deep: bool) -> list[tuple[str, int]]:
    """Files of a folder with their sizes in bytes, sorted by the parts of their names; hidden ones are left out.

    Args:
        deep: also those of folders inside.
    """
    found = _list_remote(folder, deep) if is_url(folder) else _list_local(folder, deep)
    # hidden files are leftovers, caches and half-written ones
    visible = [(name, size) for name, size in found if not any(part.startswith(".") for part in name.split("/"))]
    return [(inside(folder, name), size) for name, size in sorted(visible, key=lambda item: item[0].split("/"))]


def expand(pattern: str) -> list[str]:
    """Files and folders that a pattern such as `raw/*.jsonl` or `s3://bucket/part-*.parquet` names, sorted."""
    if not is_url(pattern):
        import glob

        return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    with _told_with_url(pattern):
        system, path = _file_system(pattern)
        return sorted(_with_protocol(system, pattern, found) for found in system.glob(path))


def _list_local(folder: str, deep: bool) -> Iterator[tuple[str, int]]:
    for root, folders, files in _walk(folder):
        if not deep:
            folders.clear()
        for file in files:
            path = Path(root, file)
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.stat().st_size
            # silently left out, data would be missing without a word
            elif path.is_symlink() and not path.exists() and not file.startswith("."):
                raise ValueError(f"{path}: a link to nothing; mend or remove it")


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links, but enters each folder once, under its own name if it lies in `folder`."""
    top = Path(folder).resolve()
    seen = {top}

    def is_new(path: Path) -> bool:
        real = path.resolve()
        if path.name.startswith(".") or real in seen or (path.is_symlink() and real.is_relative_to(top)):
            return False
        seen.add(real)
        return True

    for root, folders, files in os.walk(folder, followlinks=True):
        # in place, which os.walk takes as the folders to enter; sorted, for systems list in any order
        folders[:] = [name for name in sorted(folders) if is_new(Path(root, name))]
        yield root, folders, files


def _list_remote(folder: str, deep: bool) -> Iterator[tuple[str, int]]:
    with _told_with_url(folder):
        system, path = _file_system(folder)
        found = system.find(path, maxdepth=None if deep else 1, detail=True)
        prefix = system._strip_protocol(folder).rstrip("/") + "/"
        for name, entry in found.items():
            yield name.removeprefix(prefix), int(entry.get("size") or 0)


def _with_protocol(system: Any, pattern: str, found: str) -> str:
    protocol = pattern.partition("://")[0]
    return found if is_url(found) else f"{protocol}://{found.lstrip('/')}"


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ValueError("reading URLs needs the package fsspec; pip install fsspec") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"its file system is not installed ({error}); pip install it") from None


@contextmanager
def _told_with_url(url: str) -> Iterator[None]:
    """Make what any file system raises one kind of error that names the URL."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{url}: no such file; check the URL") from None
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{url}: cannot be read ({reason})") from None
