"""A record before it is understood: cheap to find, cheap to send to another process, and how large it may be."""

from dataclasses import dataclass
from typing import Any

MAX_RECORD_BYTES = 1 << 28
"""Largest record: a line, a page, the members of a sample together, the pictures that it refers to together."""

MAX_RECORD_PICTURES = 1 << 11
"""Most pictures in the documents of one record, each as often as it stands there; of 512 pixels, so many take 1.6 GB
until they are codes, while those of a line of JSON could be millions."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as it lies in its source: picklable, understood by `parse_raw` in any process."""

    source: str
    """Path or URL of the file or folder."""
    kind: str
    """Which entry of `registry.KINDS` understands it."""
    place: str
    """Where it lies, such as `line 3, byte 120`; the same whoever reads it."""
    position: int
    """Bytes of the (unpacked) source before it."""
    payload: Any
    """bytes, or a dictionary of bytes, names or plain values; None if `error` says why it could not be read."""
    error: str = ""


def too_long(what: str, num_bytes: int) -> str:
    """The reason why something is set aside."""
    return f"{what} has {num_bytes:,} bytes, more than {MAX_RECORD_BYTES:,}"
