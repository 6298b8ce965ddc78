"""`pack-MODE-LENGTH.index`: the packs of a folder as one dataset, opened without touching a shard.

Little endian:

    8 bytes  "MCPKIDX\\0"    u64  version = 1    u64  bytes of the header    32 bytes  SHA-256 of header and table
    header   JSON (`PackSummary`)
    table    int64[pages, 3 + k]: offset in the file, bytes and CRC-32 of each page, and samples of each of the k strata
             in use before it
    pages    of up to 64 shards each: int64[k, shards + 1] samples of each stratum before each shard (and after the
             last), then a line "FINGERPRINT-OF-PACK NAME" for each shard

Header and table stay in memory (about 40 bytes a shard of the 64 that share a page); pages are read when needed.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np

from megachameleon.data.packing.pack_summary import PackSummary
from megachameleon.data.packing.packing import PACKING_VERSION, PackingMode
from megachameleon.data.packing.strata import NUM_STRATA
from megachameleon.files import atomic_path
from megachameleon.tokens.vocabulary import Vocabulary

MAGIC = b"MCPKIDX\x00"
PREAMBLE = struct.Struct("<8sQQ32s")
PAGE = 64
"""Shards of a page."""
CACHED_PAGES = 16
"""Of each index."""
MAX_HEAD = 1 << 30
"""Bytes of a table; no header is believed that claims more."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of an index."""

    name: str
    """File name without suffix, in the index's folder."""
    pack: str
    """Fingerprint of its pack."""
    strata: Sequence[int]
    """Samples by stratum; of the index as it is read, only of the stratum that was asked for."""


def index_path(folder: Path, mode: PackingMode, sequence_length: int) -> Path:
    """The index of a folder of shards."""
    return folder / f"pack-{mode}-{sequence_length}.index"


def write_index(path: Path, summary: PackSummary, entries: Sequence[ShardEntry]) -> None:
    """Write an index, whole or not at all."""
    used = [stratum for stratum in range(NUM_STRATA) if summary.strata[stratum]]
    counts = np.array([[entry.strata[k] for k in used] for entry in entries], dtype="<i8").reshape(len(entries), -1)
    # cumulated, so that a sample is found by bisection and not by a sum over shards
    before = np.concatenate([np.zeros((1, len(used)), dtype="<i8"), np.cumsum(counts, axis=0)]).astype("<i8")
    pages = []
    for start in range(0, len(entries), PAGE):
        some = entries[start : start + PAGE]
        lines = "".join(f"{entry.pack} {entry.name}\n" for entry in some)
        pages.append(before[start : start + len(some) + 1].T.tobytes() + lines.encode())
    text = json.dumps({**asdict(summary), "pages": len(pages)}, sort_keys=True).encode()
    table = np.zeros((len(pages), 3 + len(used)), dtype="<i8")
    sizes = np.array([len(page) for page in pages], dtype=np.int64)
    table[:, 0] = PREAMBLE.size + len(text) + table.nbytes + np.cumsum(sizes) - sizes
    table[:, 1] = sizes
    table[:, 2] = [crc32(page) for page in pages]
    table[:, 3:] = before[:-1][::PAGE]
    # the table holds checksums of the pages, so this one covers the whole file
    digest = hashlib.sha256(text + table.tobytes()).digest()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(PREAMBLE.pack(MAGIC, 1, len(text), digest) + text + table.tobytes())
        file.writelines(pages)


class PackIndex:
    """An index as it is read: a few files' worth of memory, whatever the number of samples."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: missing, damaged, or of another version.
        """
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; run preprocess_data.py pack") from None
        self.summary, self._table = self._read_head()
        self._used = [stratum for stratum in range(NUM_STRATA) if self.summary.strata[stratum]]
        # on the instance: on the class it would keep every index alive
        self.page = lru_cache(CACHED_PAGES)(self._read_page)

    def find(self, stratum: int, ordinal: int) -> tuple[ShardEntry, int]:
        """The shard with this sample of a stratum, and which of the shard's own samples of the stratum it is."""
        column = self._used.index(stratum)
        page = int(self._table[:, 3 + column].searchsorted(ordinal, side="right")) - 1
        before, lines = self.page(page)
        row = int(before[column].searchsorted(ordinal, side="right")) - 1
        start, end = before[column][row : row + 2].tolist()
        return self._entry(lines[row], [end - start]), ordinal - start

    def entry(self, number: int) -> tuple[ShardEntry, list[int]]:
        """A shard by its number, with its samples of every stratum; and the samples of each stratum before it."""
        page, row = divmod(number, PAGE)
        before, lines = self.page(page)
        first, counts = [0] * NUM_STRATA, [0] * NUM_STRATA
        for column, stratum in enumerate(self._used):
            first[stratum], end = before[column][row : row + 2].tolist()
            counts[stratum] = end - first[stratum]
        return self._entry(lines[row], counts), first

    def _entry(self, line: str, counts: list[int]) -> ShardEntry:
        pack, _, name = line.partition(" ")
        # an index may come from strangers, and must not name files outside its folder
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise self._damaged(f"{name!r} is not the name of a shard")
        return ShardEntry(name, pack, counts)

    def _read_head(self) -> tuple[PackSummary, np.ndarray]:
        preamble = self._file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size:
            raise self._damaged("shorter than its preamble")
        magic, version, size, digest = PREAMBLE.unpack(preamble)
        if magic != MAGIC or version != 1 or size > self.path.stat().st_size:
            raise self._damaged("not a version 1 index of packs")
        text = self._file.read(size)
        try:
            values = json.loads(text)
            pages, strata = values.pop("pages"), values["strata"]
            width = 3 + sum(count > 0 for count in strata)
            table = self._file.read(min(max(pages, 0) * width * 8, MAX_HEAD))
            intact = hashlib.sha256(text + table).digest() == digest
        except (ValueError, TypeError, KeyError, AttributeError):
            intact = False
        if not intact:
            raise self._damaged("its SHA-256 is not the one that it was written with")
        if values["packing_version"] != PACKING_VERSION:
            raise ValueError(
                f"{self.path}: packed by version {values['packing_version']} of the packing, this program has "
                f"{PACKING_VERSION}; run preprocess_data.py pack again"
            )
        if set(values) != {field.name for field in fields(PackSummary)}:
            raise self._damaged("missing or unknown fields")
        values["vocabulary"] = Vocabulary.from_dict(values["vocabulary"], origin=str(self.path))
        return PackSummary(**values), np.frombuffer(table, "<i8").reshape(pages, width)

    def _read_page(self, number: int) -> tuple[np.ndarray, list[str]]:
        offset, size, check = self._table[number, :3].tolist()
        content = os.pread(self._file.fileno(), size, offset)  # processes that were forked share a file's position
        if len(content) != size or crc32(content) != check:
            raise self._damaged(f"page {number} has a wrong checksum")
        shards = min(PAGE, self.summary.shards - number * PAGE)
        before = np.frombuffer(content, "<i8", len(self._used) * (shards + 1)).reshape(len(self._used), shards + 1)
        return before, content[before.nbytes :].decode().split("\n")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: damaged index ({what}); run preprocess_data.py pack again")
