"""The sources that files, folders, patterns and URLs name."""

import posixpath
from collections.abc import Iterable
from pathlib import Path

from megachameleon.data.sources.folder import captions_beside_pictures, described_by_metadata
from megachameleon.data.sources.locations import (
    absolute_source,
    base_name,
    expand,
    file_size,
    is_folder,
    list_folder,
    source_name,
)
from megachameleon.data.sources.registry import KNOWN_SUFFIXES


def find_sources(paths: Iterable[str | Path]) -> list[str]:
    """The sources that `paths` name, in the order given and then of names; folders are searched at any depth.

    Args:
        paths: files, folders, or patterns such as `raw/*.jsonl`; local, or URLs.

    Returns:
        Files of known kinds, and folders that hold pictures with captions beside them.

    Raises:
        ValueError: a path is missing, a folder holds no source, a file is of no known kind, or comes twice.
    """
    found = [source for path in paths for given in _expanded(source_name(path)) for source in _sources_at(given)]
    seen: dict[str, str] = {}
    for source in found:
        # by resolved paths: the same file under two links would be trained on twice
        earlier = seen.setdefault(absolute_source(source), source)
        if earlier is not source:
            also = "" if earlier == source else f", also as {earlier}"
            raise ValueError(f"{source}: given twice{also}; name each input once, and leave out links to others")
    if not found:
        raise ValueError("no inputs given; name files or folders")
    return found


def _expanded(path: str) -> list[str]:
    # a file whose name has such marks is meant as it is
    if not any(mark in path for mark in "*?[") or file_size(path) is not None or is_folder(path):
        return [path]
    found = [name for name in expand(path) if is_folder(name) or base_name(name).lower().endswith(KNOWN_SUFFIXES)]
    if not found:
        raise ValueError(f"{path}: no {', '.join(KNOWN_SUFFIXES)} files or folders by this pattern; check it")
    return found


def _sources_at(path: str) -> list[str]:
    if file_size(path) is None:  # asked first, for a web server would send a whole file to say that it is no folder
        if is_folder(path):
            return _sources_in(path)
        raise ValueError(f"{path}: no such file or folder; check the path")
    if not base_name(path).lower().endswith(KNOWN_SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(KNOWN_SUFFIXES)}")
    return [path]


def _sources_in(folder: str) -> list[str]:
    """Sources below a folder; README files, which tell people what a folder holds, are left out."""
    contents: dict[str, list[str]] = {}
    for path, _ in list_folder(folder, deep=True):
        contents.setdefault(posixpath.dirname(path), []).append(base_name(path))
    sources: list[str] = []
    for inner, names in contents.items():
        captions = captions_beside_pictures(names)
        # metadata describes the same pictures, so both would give each twice
        if captions and not described_by_metadata(names):
            sources.append(inner)
        sources += [
            f"{inner}/{name}"
            for name in names
            if name.lower().endswith(KNOWN_SUFFIXES) and name not in captions and not name.lower().startswith("readme")
        ]
    if not sources:
        raise ValueError(
            f"{folder}: no {', '.join(KNOWN_SUFFIXES)} files and no pictures with captions in this folder; "
            "check the path"
        )
    return sources
