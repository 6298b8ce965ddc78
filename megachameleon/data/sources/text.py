"""Plain text: a file is one document."""

from collections.abc import Iterator
from typing import BinaryIO

from megachameleon.data.records import Record, SegmentsRecord, TextSegment, checked_text, decode_text
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, RawRecord


def read_whole(source: str, kind: str, file: BinaryIO, limit: int = MAX_RECORD_BYTES) -> Iterator[RawRecord]:
    """A file as its only record."""
    # bounded: a small packed file may unpack to anything
    content = file.read(limit + 1)
    if len(content) <= limit:
        yield RawRecord(source, kind, "byte 0", 0, content)
        return
    while file.read(1 << 20):  # on to the end, for a damaged one is damaged whatever its length
        pass
    yield RawRecord(source, kind, "byte 0", 0, None, f"longer than {limit:,} bytes")


def read_raw_text(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """A text file, unpacked as `file`."""
    return read_whole(source, "text", file)


def parse_raw_text(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a text file.

    Raises:
        ValueError: it is not UTF-8, or empty.
    """
    try:
        text = decode_text(raw.payload)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 (at its byte {error.start})") from None
    return SegmentsRecord(raw.place, (TextSegment(checked_text(text, "text")),))


def count_raw_text(raw: RawRecord) -> tuple[int, int]:
    """Bytes of text, and no pictures."""
    return len(raw.payload), 0
