"""JSONL: one JSON object a line, in the forms of `forms`; empty lines are skipped."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from megachameleon.data.records import Record
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.forms import PICTURE_KEYS, record_of
from megachameleon.data.sources.json_values import parse_json
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, RawRecord

_PICTURES = re.compile("|".join(f'"{key}' for key in PICTURE_KEYS).encode())
"""Lines without any of these hold text alone, and are not worth parsing to count pictures."""


def read_raw_jsonl(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """The lines of a JSONL file, unpacked as `file`."""
    position = number = 0
    # bounded, for a file without line ends would be read into memory whole
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        place, begin = f"line {number}, byte {position}", position
        position += len(line)
        if len(line) <= MAX_RECORD_BYTES:
            if not line.isspace():
                yield RawRecord(source, "jsonl", place, begin, line)
            continue
        # on to the next line: one endless line sets aside one record, not the rest of the file
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
            position += len(line)
        yield RawRecord(source, "jsonl", place, begin, None, f"longer than {MAX_RECORD_BYTES:,} bytes")


def parse_raw_jsonl(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a line.

    Raises:
        ValueError: it is not JSON, of no known form, or names a picture that is not there.
    """
    return record_of(raw.place, parse_json(raw.payload), beside.read)


def count_raw_jsonl(raw: RawRecord) -> tuple[int, int] | None:
    """Bytes of text, and no pictures; None for a line that may hold some."""
    return None if _PICTURES.search(raw.payload) else (len(raw.payload), 0)
