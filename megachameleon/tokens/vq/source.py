"""Where pictures lie: the files of pictures in tars and folders, with their tags, without decoding any."""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megachameleon.tokens.pictures import PICTURE_SUFFIXES

MAX_FILE_BYTES = 2**28
"""Longer encoded pictures are set aside."""
MAX_JSON_BYTES = 2**20
"""Longer JSON files are not searched for tags."""
MIN_PICTURES = 32
"""Distinct usable ones below which nothing is trained."""


@dataclass(frozen=True, slots=True)
class PictureInput:
    """A tar or folder, and a tag for all of its pictures."""

    path: Path
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.tag}={self.path}" if self.tag else str(self.path)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """Where the bytes of one encoded picture lie."""

    name: str
    """Name in its tar; empty for a file of its own."""
    path: Path
    offset: int
    size: int
    tags: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """`folder/a.png` or `shard.tar/a.png`."""
        return f"{self.path}/{self.name}" if self.name else str(self.path)

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            ValueError: too long, or the file ends before it does.
        """
        if self.size > MAX_FILE_BYTES:
            raise ValueError(f"{self.origin}: {self.size:,} bytes exceed the limit of {MAX_FILE_BYTES:,}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{self.origin}: {len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, slots=True)
class Found:
    """What `find_pictures` found."""

    files: list[PictureFile] = field(default_factory=list)
    quarantine: list[dict[str, str]] = field(default_factory=list)
    """`origin` and `reason` of each JSON file that was to be searched for tags and could not be read."""


def parse_input(text: str) -> PictureInput:
    """`path`, or `tag=path` for a tag of letters, digits, - and _; a path that exists is always a path."""
    tag, equals, path = text.partition("=")
    if equals and tag.replace("-", "").replace("_", "").isalnum() and not Path(text).exists():
        return PictureInput(Path(path), tag)
    return PictureInput(Path(text))


def find_pictures(inputs: Sequence[PictureInput], *, read_tags: bool = False) -> Found:
    """List the .png, .jpg, .jpeg and .webp files in uncompressed tars and, at any depth, in folders (tars there too).

    Args:
        read_tags: also take tags from the JSON file beside a picture (KEY.json beside KEY.png, in a tar too): the
            strings of its lists `tags` or its string `tag`.

    Raises:
        ValueError: an input is missing, a tar is damaged, or no picture is there at all.
    """
    found = Found()
    for given in inputs:
        tags = (given.tag,) if given.tag else ()
        if given.path.is_dir():
            # sorted, for file systems list in any order and the order of files decides samples
            for inner in sorted(given.path.rglob("*")):
                if inner.suffix.lower() in PICTURE_SUFFIXES and inner.is_file():
                    own = _tags_beside(inner, found) if read_tags else ()
                    found.files.append(PictureFile("", inner, 0, inner.stat().st_size, tags + own))
                elif inner.suffix == ".tar" and inner.is_file():
                    _list_tar(inner, tags, read_tags, found)
        elif given.path.is_file():
            _list_tar(given.path, tags, read_tags, found)
        else:
            raise ValueError(f"--input {given}: no such file or folder")
    if not found.files:
        names = ", ".join(map(str, inputs))
        raise ValueError(f"--input {names}: no {', '.join(PICTURE_SUFFIXES)} files there; name tars or folders of them")
    return found


def _list_tar(path: Path, tags: tuple[str, ...], read_tags: bool, found: Found) -> None:
    try:
        # uncompressed only: pictures are read by offset, in any order
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
        _require_end_mark(path, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole uncompressed tar ({error}); copy or unpack it again") from None
    plain = [member for member in members if member.isreg() and not member.issparse()]
    own = dict(_tags_in_tar(path, plain, found)) if read_tags else {}
    for member in plain:
        if member.name.lower().endswith(PICTURE_SUFFIXES):
            all_tags = tags + own.get(_key(member.name), ())
            found.files.append(PictureFile(member.name, path, member.offset_data, member.size, all_tags))


def _tags_in_tar(path: Path, members: Sequence[tarfile.TarInfo], found: Found) -> Iterator[tuple[str, tuple[str, ...]]]:
    with path.open("rb") as file:
        for member in members:
            if member.name.lower().endswith(".json"):

                def read(member: tarfile.TarInfo = member) -> bytes:
                    file.seek(member.offset_data)
                    return file.read(member.size)

                yield _key(member.name), _tags_of(read, member.size, f"{path}/{member.name}", found)


def _tags_beside(picture: Path, found: Found) -> tuple[str, ...]:
    path = picture.with_name(_key(picture.name) + ".json")
    return _tags_of(path.read_bytes, path.stat().st_size, str(path), found) if path.is_file() else ()


def _tags_of(read: Callable[[], bytes], size: int, origin: str, found: Found) -> tuple[str, ...]:
    try:
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes exceed the limit of {MAX_JSON_BYTES:,}")
        value: Any = json.loads(read())
    except (ValueError, RecursionError) as error:
        found.quarantine.append({"origin": origin, "reason": f"no tags were read: {error}"})
        return ()
    if not isinstance(value, dict):
        return ()
    listed = value.get("tags")
    tags = [*(listed if isinstance(listed, list) else ()), value.get("tag")]
    return tuple(tag for tag in tags if isinstance(tag, str) and tag)


def _key(name: str) -> str:
    """`folder/key.a.png` is `folder/key`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _require_end_mark(path: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """A tar ends with blocks of zeros; `tarfile` itself takes one that was cut within a header for whole."""
    block = tarfile.BLOCKSIZE
    end = max((m.offset_data + -(-(m.size if m.isreg() else 0) // block) * block for m in members), default=0)
    with path.open("rb") as file:
        file.seek(end)
        if file.read(block) != bytes(block):
            raise tarfile.ReadError("it ends without the mark of its end")
