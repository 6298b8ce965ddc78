"""What a plan freezes of a source: its bytes, what it refers to, and how much is in it; in one reading of the file."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from megachameleon.data.records import BadRecord, CaptionedRecord, PictureSegment
from megachameleon.data.sources.beside import ReferenceHash
from megachameleon.data.sources.compression import unpacked
from megachameleon.data.sources.damage import damage_reported
from megachameleon.data.sources.folder import folder_contents
from megachameleon.data.sources.locations import BUFFER_BYTES, open_location, source_name
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.reading import parse_raw, read_raw, texts_of
from megachameleon.data.sources.registry import KINDS, kind_of_source


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceHash:
    """The bytes of a source."""

    bytes: int
    """Size of the file, packed as it is; of a folder, of all its files."""
    sha256: str
    """Of the file; of a folder, of its files' names and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey(SourceHash):
    """What a whole reading of a source tells. Two equal ones mean that nothing changed, what it refers to included."""

    num_records: int
    """Good and bad ones."""
    text_bytes: int
    """Unpacked bytes of text, and of what could not be understood."""
    num_pictures: int
    references: str | None
    """SHA-256 over the names and contents of the files beside it that its records name; None if they name none."""


def hash_source(source: str | Path) -> SourceHash:
    """Size and hash of a source, read once, whatever is in it; a folder's files are only listed.

    Raises:
        ValueError: a URL that cannot be read.
    """
    name = source_name(source)
    if kind_of_source(name) == "folder":
        return _hash_of_folder(name)
    with open_location(name) as file:
        hashing = _Hashing(file)
        return hashing.finish()


def survey_source(source: str | Path) -> Survey:
    """Count text and pictures, hash the source and what it refers to, and find damage before any work.

    Raises:
        DamagedArchiveError: it is damaged or truncated.
        ValueError: it cannot be opened, or none of its columns is known.
    """
    count = _Count()
    hashes: list[SourceHash] = []
    for raw in read_hashed(source, hashes.append):
        count.add(raw)
    return count.survey(hashes[0])


def read_hashed(source: str | Path, finish: Callable[[SourceHash], None]) -> Iterator[RawRecord]:
    """Find the records of one source as `read_raw` does, and hash what is read.

    Args:
        finish: is told size and hash after the last record.

    Raises: as `read_raw`.
    """
    name = source_name(source)
    kind = kind_of_source(name)
    if kind in ("folder", "parquet"):  # neither is read from its beginning to its end
        yield from read_raw(name)
        finish(hash_source(name))
        return
    with damage_reported(name), open_location(name) as file:
        hashing = _Hashing(file)
        with unpacked(cast(BinaryIO, io.BufferedReader(hashing, BUFFER_BYTES)), name) as content:
            yield from KINDS[kind].read(name, content)
            # inside the `with`: what follows the last record, such as a tar's padding, is hashed as well
            finish(hashing.finish())


class _Count:
    def __init__(self) -> None:
        self._num_records = self._text_bytes = self._num_pictures = 0
        self._references = ReferenceHash()

    def add(self, raw: RawRecord) -> None:
        self._num_records += 1
        counted = None if raw.error else KINDS[raw.kind].count(raw)
        # parsing costs more than finding, so it is left out where bytes alone tell
        if counted is None:
            counted = self._understood(raw)
        self._text_bytes += counted[0]
        self._num_pictures += counted[1]

    def survey(self, file: SourceHash) -> Survey:
        return Survey(
            bytes=file.bytes,
            sha256=file.sha256,
            num_records=self._num_records,
            text_bytes=self._text_bytes,
            num_pictures=self._num_pictures,
            references=self._references.value(),
        )

    def _understood(self, raw: RawRecord) -> tuple[int, int]:
        record = parse_raw(raw, self._references.note)
        if isinstance(record, BadRecord):
            return len(raw.payload) if isinstance(raw.payload, bytes) else 1, 0
        text = sum(len(text.encode()) for text in texts_of(record))
        if isinstance(record, CaptionedRecord):
            return text, 1
        return text, sum(isinstance(segment, PictureSegment) for segment in record.segments)


def _hash_of_folder(folder: str) -> SourceHash:
    files = folder_contents(folder)
    listing = "".join(f"{name}\0{size}\n" for name, size in files).encode("utf-8", "surrogateescape")
    return SourceHash(bytes=sum(size for _, size in files), sha256=hashlib.sha256(listing).hexdigest())


class _Hashing(io.RawIOBase):
    """Hashes a file while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._digest.update(content)
        self._bytes += len(content)
        return len(content)

    def finish(self) -> SourceHash:
        """Read what is left, and give the hash of all."""
        while self.read(BUFFER_BYTES):
            pass
        return SourceHash(bytes=self._bytes, sha256=self._digest.hexdigest())
