"""`UNIT.pack-MODE-LENGTH`: the samples of one shard, written beside it. All numbers are little endian.

    8 bytes  "MCPACK\\0\\0"         u64  version = 1
    u64      bytes of the header    u32  CRC-32 of the header      u32  0
    header   JSON, padded with spaces to a multiple of 8 (`PackHeader`)
    int64[n + 1]  sample i has the pieces ends[i]..ends[i + 1]      int64[p]  first id of each piece in `.bin`
    int32[n] labels with loss       int32[n] picture codes among them
    u32[n]   CRC-32 of a sample's lengths, then of its ids          int32[p]  ids of each piece

A sample is checked whenever it is read, so a byte that changed, here or in `.bin`, cannot become a wrong token.
"""

import hashlib
import json
import mmap
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megachameleon.data.packing.packing import PACKING_VERSION, Packing, PackingMode, pack
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import ShardReader, shard_file
from megachameleon.files import atomic_path

MAGIC = b"MCPACK\x00\x00"
PREAMBLE = struct.Struct("<8sQQII")
MAX_HEADER = 1 << 16
"""Bytes; what claims a longer header is damaged."""
FEW_PIECES = 20
"""Up to so many are copied one by one, which is then faster than index by index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackHeader:
    """What was packed and how."""

    mode: PackingMode
    """How documents were laid."""
    sequence_length: int
    """Positions of a sample; it holds up to one id more."""
    packing_version: int
    """`PACKING_VERSION` of the program that packed."""
    content: str
    """Hash of the shard's data files."""
    samples: int
    """How many there are."""
    pieces: int
    """Of documents, in all samples."""
    strata: list[int]
    """Samples by stratum."""
    arrays: str
    """SHA-256 of all that follows the header."""

    @property
    def fingerprint(self) -> str:
        """A hash of the whole file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def pack_path(prefix: Path, mode: PackingMode, sequence_length: int) -> Path:
    """The file with the samples of a shard."""
    return shard_file(prefix, f".pack-{mode}-{sequence_length}")


def content_of(manifest: ShardManifest) -> str:
    """A short hash of a shard's data files."""
    return hashlib.sha256(manifest.content_hash.encode()).hexdigest()[:32]


def pack_shard(shard: ShardReader, sequence_length: int, mode: PackingMode) -> Packing:
    """Lay the documents of a shard into samples, in memory.

    Raises:
        ValueError: a picture does not fit a sample.
    """
    return pack(shard.lengths, shard.num_images, shard.all_image_spans, shard.vocabulary, sequence_length, mode)


class PackedShard:
    """The samples of one shard."""

    def __init__(
        self, prefix: Path, ids: np.ndarray, packing: Packing, sequence_length: int, checks: np.ndarray | None = None
    ) -> None:
        """
        Args:
            ids: all ids of the shard, a plain array (slices of np.memmap cost ten times as much).
            checks: CRC-32 of each sample, uint32 [samples]; None for samples that were just made.
        """
        self.prefix = prefix
        self.packing = packing
        self._ids, self._capacity, self._checks = ids, sequence_length + 1, checks

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [at most S + 1] of a sample, and the lengths of its pieces [n].

        Raises:
            ValueError: the files changed since they were packed.
        """
        first, last = self.packing.ends[index : index + 2].tolist()
        # ends may be damaged too, and are not trusted as sizes before the checksum is known
        if not 0 <= first < last <= first + self._capacity:
            raise self._changed(index)
        starts, lengths = self.packing.offsets[first:last], self.packing.lengths[first:last]
        size = len(self._ids)
        inside = lengths.min() > 0 and 0 <= starts.min() <= starts.max() < size >= (starts + lengths).max()
        if not inside or lengths.sum(dtype=np.int64) > self._capacity:
            raise self._changed(index)
        ids = self._gather(starts, lengths)
        if self._checks is not None and crc32(ids.data, crc32(lengths.data)) != self._checks[index]:
            raise self._changed(index)
        return ids, lengths

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if len(starts) <= FEW_PIECES:
            bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            pieces = [self._ids[start:end] for start, end in bounds]
            # one piece is a view of the map: nothing is copied
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        shift = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        return self._ids.take(shift + np.arange(len(shift)))

    def _changed(self, index: int) -> ValueError:
        return ValueError(
            f"{shard_file(self.prefix, '.bin')}: sample {index} has another checksum than when it was packed, so this "
            "file or its pack was changed or damaged; restore it, or preprocess and pack again (preprocess_data.py)"
        )


def write_pack(shard: ShardReader, sequence_length: int, mode: PackingMode) -> tuple[PackHeader, Packing]:
    """Pack a shard and write the samples beside it, whole or not at all.

    Raises:
        ValueError: a picture does not fit a sample.
    """
    packing = pack_shard(shard, sequence_length, mode)
    source = PackedShard(shard.prefix, shard.ids, packing, sequence_length)
    checks = np.empty(len(packing), dtype="<u4")
    for index in range(len(packing)):
        ids, lengths = source.read(index)
        checks[index] = crc32(ids.data, crc32(lengths.data))
    parts = [
        part.astype(dtype).tobytes()
        for part, dtype in zip(
            (packing.ends, packing.offsets, packing.labels, packing.image_labels, checks, packing.lengths),
            ("<i8", "<i8", "<i4", "<i4", "<u4", "<i4"),
            strict=True,
        )
    ]
    body = b"".join(parts)
    header = PackHeader(
        mode=mode,
        sequence_length=sequence_length,
        packing_version=PACKING_VERSION,
        content=content_of(shard.manifest),
        samples=len(packing),
        pieces=len(packing.lengths),
        strata=packing.strata.tolist(),
        arrays=hashlib.sha256(body).hexdigest(),
    )
    text = json.dumps(asdict(header), sort_keys=True).encode()
    # int64 arrays follow, and views of them should be aligned
    text += b" " * (-len(text) % 8)
    with atomic_path(pack_path(shard.prefix, mode, sequence_length)) as path:
        path.write_bytes(PREAMBLE.pack(MAGIC, 1, len(text), crc32(text), 0) + text + body)
    return header, packing


def read_pack(path: Path) -> tuple[PackHeader, Packing, np.ndarray]:
    """Map a pack; returns its header, its samples and their checks. Costs the same for any size.

    Raises:
        ValueError: missing, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            # mmap refuses an empty file by ValueError, hence "empty" below
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; run preprocess_data.py pack again") from None
    except ValueError:
        raise _damaged(path, "empty") from None
    header, offset = _read_header(path, content)
    n, p = header.samples, header.pieces
    layout = ((n + 1, "<i8"), (p, "<i8"), (n, "<i4"), (n, "<i4"), (n, "<u4"), (p, "<i4"))
    # before views are made: the header's checksum does not show that the rest is there
    if len(content) != offset + sum(count * np.dtype(dtype).itemsize for count, dtype in layout):
        raise _damaged(path, f"{len(content)} bytes do not hold {n} samples of {p} pieces")
    arrays = []
    for count, dtype in layout:
        arrays.append(np.frombuffer(content, dtype, count, offset))
        offset += arrays[-1].nbytes
    ends, offsets, labels, image_labels, checks, lengths = arrays
    packing = Packing(ends=ends, offsets=offsets, lengths=lengths, labels=labels, image_labels=image_labels)
    return header, packing, checks


def verify_pack(path: Path) -> None:
    """Read all of a pack and compare it with its header.

    Raises:
        ValueError: it was changed.
    """
    header, _, _ = read_pack(path)
    content = path.read_bytes()
    _, offset = _read_header(path, content)
    if hashlib.sha256(memoryview(content)[offset:]).hexdigest() != header.arrays:
        raise _damaged(path, "its SHA-256 is not the one in its header")


def _read_header(path: Path, content: Any) -> tuple[PackHeader, int]:
    if len(content) < PREAMBLE.size:
        raise _damaged(path, "shorter than its preamble")
    magic, version, size, check, zero = PREAMBLE.unpack_from(content)
    if magic != MAGIC or version != 1 or zero:
        raise _damaged(path, "not a version 1 pack")
    text = content[PREAMBLE.size : PREAMBLE.size + size] if size <= MAX_HEADER else b""
    if len(text) != size or size % 8 or crc32(text) != check:
        raise _damaged(path, "header with a wrong checksum")
    values = json.loads(text)
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(PackHeader)}:
        raise _damaged(path, "header with missing or unknown fields")
    header = PackHeader(**values)
    if header.packing_version != PACKING_VERSION:
        raise ValueError(
            f"{path}: packed by version {header.packing_version} of the packing, this program has {PACKING_VERSION}; "
            "run preprocess_data.py pack again"
        )
    return header, PREAMBLE.size + size


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged pack ({what}); run preprocess_data.py pack again")
