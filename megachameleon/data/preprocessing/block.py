"""What goes to workers and comes back: a batch of raw records, a block of documents in ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megachameleon.data.records import BadRecord
from megachameleon.data.sources.raw import RawRecord


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records of one input that follow each other."""

    input: int
    """Which of the unit's inputs."""
    records: Sequence[RawRecord | BadRecord]
    drop: np.ndarray
    """Documents to leave out, int64 as in `ORDINAL_BITS`, with records counted from the first of the batch."""


@dataclass(slots=True)
class Block:
    """Documents of one batch, one after the other."""

    input: int
    num_records: int
    position: int
    """Bytes of the (unpacked) input before its last record."""
    ids: np.ndarray
    """[n] in the vocabulary's dtype; each code of a picture is still code 0."""
    lengths: np.ndarray
    """Of the documents, int64."""
    holes: np.ndarray
    """Where the first code of each picture belongs, int64 [pictures]."""
    keys: list[str]
    """Key of each picture, as in `code_key`."""
    codes: dict[str, np.ndarray]
    """Codes that a cache knows, by key."""
    pixels: dict[str, np.ndarray]
    """The other pictures, prepared, by key: uint8 [3, size, size]."""
    bad: list[BadRecord] = field(default_factory=list)
    num_filtered: int = 0
    num_duplicates: int = 0
    references: list[tuple[str, str]] = field(default_factory=list)
    """Names of files beside the input, and the `found_hash` of each, in the order of reading."""
