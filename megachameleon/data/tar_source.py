"""Webdataset tars: samples are runs of members that share a key, the name up to the first dot of its last part.

    KEY.png + KEY.txt                    one caption
    KEY.png + KEY.json                   {"captions": [{"lang": "en", "text": "..."}, ...]} or {"caption": "..."}
    KEY.json + KEY.0.png + KEY.1.png     {"segments": [{"text": "..."}, {"image": "0.png"}, ...]}
    KEY.txt, or KEY.json                 text alone, {"text": "..."}

Member names are only ever compared, never used as paths. Unlike Python's `tarfile`, an archive that ends anywhere but
at its end mark is an error.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megachameleon.data.json_records import parse_json, segments_record
from megachameleon.data.records import (
    BadRecord,
    Caption,
    CaptionedRecord,
    PictureSegment,
    Record,
    SegmentsRecord,
    TextSegment,
    checked_text,
    decode_text,
    parse_captions,
)
from megachameleon.tokens.pictures import PICTURE_SUFFIXES

MAX_MEMBER_BYTES = 1 << 28
PICTURE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)

Members = dict[str, bytes]


class DamagedArchiveError(ValueError):
    """A file that ends early or is not what its name says; everything before the damage was read."""

    def __init__(self, path: Path, damage: str) -> None:
        super().__init__(path, damage)  # both, for an error that comes from another process is made anew from them
        self.path = path
        self.reason = f"damaged or truncated ({damage})"

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.reason}; copy it again "
            "(preprocess_data.py plan --allow-damaged-archives keeps what is before the damage)"
        )


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, through gzip when its name ends in `.gz` or `.tgz`."""
    with path.open("rb") as raw:
        if path.suffix in (".gz", ".tgz"):
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield raw


def read_tar(path: Path, report: Callable[[int], None]) -> Iterator[Record | BadRecord]:
    """Read the records of a tar.

    Args:
        report: is told the position in the archive now and then.

    Raises:
        DamagedArchiveError: the archive is damaged or truncated; raised after its whole records.
    """
    key, members, error = "", Members(), ""
    for member, read in walk_tar(path):
        report(member.offset)
        new_key, extension = split_name(member.name)
        if new_key != key:
            if members or error:
                yield _record(path, key, members, error)
            key, members, error = new_key, Members(), ""
        if not member.isfile():
            error = f"{member.name} is a link or a device, not a file"
        elif member.size > MAX_MEMBER_BYTES:
            error = f"{member.name} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
        elif extension in members:
            error = f"two members are named {member.name}"
        else:
            members[extension] = read()
    if members or error:
        yield _record(path, key, members, error)


def walk_tar(path: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Members of a tar but folders, each with a function that reads it.

    Raises:
        DamagedArchiveError: the archive is damaged or truncated.
    """
    with damage_reported(path), opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            if not member.isdir():
                yield member, lambda member=member: _read(path, archive, member)  # type: ignore[misc]
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end mark at byte {archive.offset:,}")


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn what damaged files make the standard library raise into `DamagedArchiveError`."""
    try:
        yield
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedArchiveError(path, str(error)) from None


def split_name(name: str) -> tuple[str, str]:
    """`folder/key.a.png` is (`folder/key`, `a.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _read(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with damage_reported(path):
        file = archive.extractfile(member)
        content = file.read() if file is not None else b""
        if len(content) != member.size:
            raise tarfile.ReadError(f"{member.name} ends early")
        return content


def _record(path: Path, key: str, members: Members, error: str) -> Record | BadRecord:
    try:
        if error:
            raise ValueError(error)
        return _parse(key, members)
    except ValueError as problem:
        return BadRecord(path.name, key, str(problem))


def _parse(origin: str, members: Members) -> Record:
    values = parse_json(members["json"]) if "json" in members else {}
    base = origin.rpartition("/")[2]
    pictures = {name: PictureSegment(data, f"{base}.{name}") for name, data in members.items() if _is_picture(name)}
    if "segments" in values:
        return segments_record(origin, values["segments"], lambda name: _member_picture(pictures, name))
    captions = parse_captions(values) or _text_caption(members)
    if pictures:
        return _captioned(origin, pictures, captions)
    if "text" in values:
        return SegmentsRecord(origin, (TextSegment(checked_text(values["text"], "text")),))
    if "txt" in members:
        return SegmentsRecord(origin, (TextSegment(captions[0].text),))
    raise ValueError(f"unknown form: members {sorted(members)} with JSON keys {sorted(values)}")


def _captioned(origin: str, pictures: dict[str, PictureSegment], captions: tuple[Caption, ...]) -> Record:
    if len(pictures) != 1:
        raise ValueError(f"several pictures ({', '.join(sorted(pictures))}) but no JSON with segments")
    if not captions:
        raise ValueError("a picture without a caption")
    (picture,) = pictures.values()
    return CaptionedRecord(origin, picture, captions)


def _is_picture(extension: str) -> bool:
    return extension.rpartition(".")[2] in PICTURE_EXTENSIONS


def _member_picture(pictures: dict[str, PictureSegment], name: Any) -> PictureSegment:
    if not isinstance(name, str) or name.lower() not in pictures:
        raise ValueError(f"image {name!r} is not among the sample's members {sorted(pictures)}")
    return pictures[name.lower()]


def _text_caption(members: Members) -> tuple[Caption, ...]:
    if "txt" not in members:
        return ()
    try:
        return (Caption(checked_text(decode_text(members["txt"]).strip(), "caption")),)
    except UnicodeDecodeError:
        raise ValueError("caption is not valid UTF-8") from None
