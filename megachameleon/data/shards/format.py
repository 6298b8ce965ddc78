"""The two index files of a shard, byte by byte. All numbers are little endian.

`.idx` is megatron-core's IndexedDataset index with one sequence a document (n documents):

    9 bytes  "MMIDIDX\\0\\0"        u64  version = 1
    u8       dtype: 8 uint16, 4 int32
    u64      n                     u64  n + 1
    int32[n] lengths in tokens     int64[n] byte offsets in `.bin`     int64[n + 1] 0, 1, ..., n

`.spans` says where pictures lie in each document (m pictures):

    8 bytes  "MCSPANS\\0"           u64  version = 1
    u64      n                     u64  m
    int64[n + 1]  pictures of document i are rows first[i]..first[i + 1] of
    int32[m, 2]   start within the document and length, in tokens, begin and end ids included
"""

import struct
from pathlib import Path
from typing import Protocol

import numpy as np

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
# megatron-core's DType; its own choice would be int32 from 65,500 ids on, so it is written out
DTYPE_CODES = {"uint16": 8, "int32": 4}

SPANS_MAGIC = b"MCSPANS\x00"
SPANS_HEADER = struct.Struct("<8sQQQ")


class Writable(Protocol):
    """What the index files are written to."""

    def write(self, data: bytes, /) -> int:
        """Append bytes."""


def write_idx(file: Writable, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an `.idx` for documents of these lengths (in tokens) in ids of this dtype."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    file.write(IDX_HEADER.pack(IDX_MAGIC, 1, DTYPE_CODES[dtype.name], n, n + 1))
    file.write(lengths.astype("<i4").tobytes())
    # [:n] for a shard without documents, which has no offset
    file.write(np.concatenate(([0], ends[:-1])).astype("<i8")[:n].tobytes())
    file.write(np.arange(n + 1, dtype="<i8").tobytes())


def parse_idx(content: bytes, path: Path, dtype: np.dtype) -> np.ndarray:
    """Check the bytes of an `.idx`; returns the documents' lengths, int64 [n].

    Args:
        path: names the file in errors.

    Raises:
        ValueError: damaged, of another version or dtype, or not one sequence a document.
    """
    if len(content) < IDX_HEADER.size:
        raise _damaged(path, "shorter than its header")
    magic, version, code, n, num_boundaries = IDX_HEADER.unpack_from(content)
    if magic != IDX_MAGIC or version != 1:
        raise _damaged(path, "not a version 1 index of megatron-core")
    if code != DTYPE_CODES[dtype.name]:
        raise _damaged(path, f"dtype code {code}, but the vocabulary needs {dtype.name}")
    # before numpy allocates by what the header claims
    if num_boundaries != n + 1 or len(content) != IDX_HEADER.size + 20 * n + 8:
        raise _damaged(path, f"{len(content)} bytes do not hold {n} documents of one sequence each")
    lengths = np.frombuffer(content, "<i4", n, IDX_HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", n, IDX_HEADER.size + 4 * n)
    boundaries = np.frombuffer(content, "<i8", n + 1, IDX_HEADER.size + 12 * n)
    ends = np.cumsum(lengths) * dtype.itemsize
    consistent = np.array_equal(pointers + lengths * dtype.itemsize, ends)
    if not (consistent and (lengths > 0).all() and np.array_equal(boundaries, np.arange(n + 1))):
        raise _damaged(path, "lengths, offsets and document boundaries contradict each other")
    return lengths


def write_spans(file: Writable, counts: np.ndarray, spans: np.ndarray) -> None:
    """Write a `.spans`: pictures by document [n] and all their (start, length) [m, 2]."""
    first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    file.write(SPANS_HEADER.pack(SPANS_MAGIC, 1, len(counts), len(spans)))
    file.write(first.astype("<i8").tobytes())
    file.write(spans.astype("<i4").tobytes())


def parse_spans(content: bytes, path: Path, lengths: np.ndarray, image_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Check the bytes of a `.spans` of documents of these lengths.

    Args:
        path: names the file in errors.

    Returns:
        `first` int64 [n + 1] and `spans` int32 [m, 2], as in the module's docstring.

    Raises:
        ValueError: damaged, or a picture of another length than `image_length`, out of its document or overlapping.
    """
    if len(content) < SPANS_HEADER.size:
        raise _damaged(path, "shorter than its header")
    magic, version, n, m = SPANS_HEADER.unpack_from(content)
    if magic != SPANS_MAGIC or version != 1:
        raise _damaged(path, "not a version 1 spans file")
    # before numpy allocates by what the header claims
    if n != len(lengths) or len(content) != SPANS_HEADER.size + 8 * (n + 1) + 8 * m:
        raise _damaged(path, f"{len(content)} bytes do not hold {m} pictures of {n} documents")
    first = np.frombuffer(content, "<i8", n + 1, SPANS_HEADER.size)
    spans = np.frombuffer(content, "<i4", 2 * m, SPANS_HEADER.size + 8 * (n + 1)).reshape(m, 2)
    if first[0] != 0 or first[-1] != m or (first[1:] < first[:-1]).any():  # differences could overflow
        raise _damaged(path, "documents' shares of the pictures contradict each other")
    document = np.repeat(np.arange(n), np.diff(first))
    # int64, because a damaged start plus its length may pass the end of int32
    starts, ends = spans[:, 0].astype(np.int64), spans.sum(axis=1, dtype=np.int64)
    inside = (starts >= 0).all() and (ends <= lengths[document]).all() and (spans[:, 1] == image_length).all()
    if not (inside and ((ends[:-1] <= starts[1:]) | (document[:-1] != document[1:])).all()):
        raise _damaged(path, f"pictures overlap, leave their document or are not {image_length} ids long")
    return first, spans


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged index ({what}); preprocess the data again")
