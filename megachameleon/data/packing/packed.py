"""A dataset as samples: found through pack indices, or packed in memory where the data is small."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from megachameleon.data.packing.pack_file import PackedShard, content_of, pack_path, pack_shard, read_pack
from megachameleon.data.packing.pack_index import PackIndex, index_path
from megachameleon.data.packing.pack_summary import PackSummary, shard_summary, total
from megachameleon.data.packing.packing import PackingMode
from megachameleon.data.packing.strata import NUM_STRATA
from megachameleon.data.plan import PLAN_FILE, load_plan
from megachameleon.data.samples import Sample
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import ShardReader, shard_file, shard_prefixes
from megachameleon.tokens.vocabulary import Vocabulary

MAX_DOCUMENTS = 5_000_000
"""Packed in memory at most; about 2 s a million."""
MAX_SHARDS = 4_096
"""Opened at once at most."""
OPEN_SHARDS = 64
"""Of an index, kept open."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies: the shard and its number among the shard's samples."""

    shard: Path
    """Prefix of its files."""
    sample: int
    """From 0, in the order of the shard's pack."""


class Source(Protocol):
    """The samples of one folder or shard."""

    summary: PackSummary

    def find(self, stratum: int, ordinal: int) -> tuple[PackedShard, int]:
        """The shard with this sample of a stratum, and the sample's number in it."""
        ...

    def locate(self, place: Place) -> tuple[int, int] | None:
        """The inverse: stratum and ordinal; None if the shard is not of this source."""
        ...


class PackedDataset:
    """All samples of a dataset, numbered stratum by stratum (`strata`)."""

    def __init__(self, sources: Sequence[Source], origin: str) -> None:
        """
        Args:
            origin: names the dataset in errors.

        Raises:
            ValueError: no samples, or sources of different vocabularies or tokenizers.
        """
        self.sources = tuple(sources)
        self.summary = total([source.summary for source in sources], origin)
        # over all sources stratum by stratum, so that EpochOrder needs to know sizes only
        self._starts = [0, *accumulate(self.summary.strata)]
        by_stratum = zip(*(source.summary.strata for source in sources), strict=True)
        self._before = [[0, *accumulate(counts)] for counts in by_stratum]  # samples of a stratum before each source

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the ids."""
        return self.summary.vocabulary

    @property
    def strata(self) -> list[int]:
        """Samples by stratum."""
        return self.summary.strata

    @property
    def sequence_length(self) -> int:
        """Positions of a sample."""
        return self.summary.sequence_length

    @property
    def fill_rate(self) -> float:
        """The share of positions that hold a document."""
        # + 1, because the last id of a full sample is only a label
        return self.summary.tokens / (len(self) * (self.sequence_length + 1))

    @property
    def labels_per_sample(self) -> Fraction:
        """Labels with loss, on average."""
        return Fraction(self.summary.labels, len(self))

    @property
    def image_share(self) -> Fraction:
        """The share of labels with loss that are picture codes."""
        return Fraction(self.summary.image_labels, max(self.summary.labels, 1))

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what sample i is; the same with and without an index."""
        content = "\n".join(source.summary.fingerprint for source in self.sources)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @property
    def identity(self) -> str:
        """The fingerprint, and what a person can compare."""
        return f"{self.fingerprint} {self.summary.shards} shards, {self.summary.documents} documents"

    def __getitem__(self, index: int) -> Sample:
        sample = Sample.empty(self.sequence_length)
        sample.lay(*self.read(index), self.vocabulary)
        return sample

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [at most S + 1] of a sample and the lengths of its pieces [n].

        Raises:
            ValueError: a shard is missing, or was changed since it was packed.
        """
        shard, number = self._find(index)
        return shard.read(number)

    def labels_of(self, index: int) -> tuple[int, int]:
        """Labels with loss of a sample, and picture codes among them."""
        shard, number = self._find(index)
        return int(shard.packing.labels[number]), int(shard.packing.image_labels[number])

    def place(self, index: int) -> Place:
        """The shard that holds a sample, and where."""
        shard, number = self._find(index)
        return Place(shard.prefix, number)

    def index_of(self, place: Place) -> int:
        """The inverse of `place`.

        Raises:
            ValueError: no such sample in this dataset.
        """
        for number, source in enumerate(self.sources):
            if found := source.locate(place):
                stratum, ordinal = found
                return self._starts[stratum] + self._before[stratum][number] + ordinal
        raise ValueError(f"{place.shard}: has no sample {place.sample} in this dataset")

    def _find(self, index: int) -> tuple[PackedShard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        stratum = bisect_right(self._starts, index) - 1
        before = self._before[stratum]
        ordinal = index - self._starts[stratum]
        number = bisect_right(before, ordinal) - 1
        return self.sources[number].find(stratum, ordinal - before[number])


class MemorySource:
    """Shards that are packed when they are opened."""

    def __init__(self, shards: Sequence[ShardReader], sequence_length: int, mode: PackingMode) -> None:
        """
        Raises:
            ValueError: no shard, shards of different vocabularies or tokenizers, or a picture that does not fit.
        """
        packings = [pack_shard(shard, sequence_length, mode) for shard in shards]
        self._shards = [
            PackedShard(shard.prefix, shard.ids, packing, sequence_length)
            for shard, packing in zip(shards, packings, strict=True)
        ]
        counts = np.array([packing.strata for packing in packings])
        self._before = np.concatenate([np.zeros((1, NUM_STRATA), dtype=np.int64), np.cumsum(counts, axis=0)])
        summaries = [
            shard_summary(shard.manifest, packing, sequence_length, mode)
            for shard, packing in zip(shards, packings, strict=True)
        ]
        self.summary = total(summaries, str(shards[0].prefix.parent))

    def find(self, stratum: int, ordinal: int) -> tuple[PackedShard, int]:
        """See `Source`."""
        number = int(np.searchsorted(self._before[:, stratum], ordinal, side="right")) - 1
        return self._shards[number], self._first(number, stratum) + ordinal - int(self._before[number, stratum])

    def locate(self, place: Place) -> tuple[int, int] | None:
        """See `Source`."""
        for number, shard in enumerate(self._shards):
            if shard.prefix == place.shard and 0 <= place.sample < len(shard.packing):
                counts = np.diff(self._before[number : number + 2], axis=0)[0]
                stratum = int(np.searchsorted(np.cumsum(counts), place.sample, side="right"))
                return stratum, int(self._before[number, stratum]) + place.sample - self._first(number, stratum)
        return None

    def _first(self, number: int, stratum: int) -> int:
        """The first sample of a stratum in a shard."""
        return int((self._before[number + 1, :stratum] - self._before[number, :stratum]).sum())


class IndexedSource:
    """Shards behind an index: each is opened and checked when a sample of it is first read."""

    def __init__(self, folder: Path, path: Path) -> None:
        """
        Raises:
            ValueError: the index is damaged, of another version, or made before the folder's plan.
        """
        self.folder = folder
        self.index = PackIndex(path)
        self.summary = self.index.summary
        if (folder / PLAN_FILE).exists() and (planned := load_plan(folder).num_units) != self.summary.shards:
            raise ValueError(
                f"{path}: made of {self.summary.shards:,} shards, but the plan beside it has {planned:,} units; "
                "run preprocess_data.py pack again"
            )
        # each open shard holds maps and a file descriptor, and a process may have only so many
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def find(self, stratum: int, ordinal: int) -> tuple[PackedShard, int]:
        """See `Source`.

        Raises:
            ValueError: the shard is missing, or was changed since it was packed.
        """
        entry, within = self.index.find(stratum, ordinal)
        shard, firsts = self._open(entry.name, entry.pack)
        return shard, firsts[stratum] + within

    def locate(self, place: Place) -> tuple[int, int] | None:
        """See `Source`; reads the index until it finds the shard."""
        if place.shard.parent != self.folder:
            return None
        for number in range(self.summary.shards):
            entry, before = self.index.entry(number)
            if entry.name == place.shard.name:
                firsts = [0, *accumulate(entry.strata)]
                stratum = bisect_right(firsts, place.sample) - 1
                inside = 0 <= place.sample < firsts[-1]
                return (stratum, before[stratum] + place.sample - firsts[stratum]) if inside else None
        return None

    def check(self, at_most: int) -> None:
        """Open shards, spread evenly over the index, and compare them with it.

        Raises:
            ValueError: one is missing, or was changed since it was packed.
        """
        count = min(at_most, self.summary.shards)
        for number in range(count):
            entry, _ = self.index.entry(number * self.summary.shards // count)
            # a shard without samples has an empty .bin, which cannot be mapped
            if sum(entry.strata):
                self._open_shard(entry.name, entry.pack)

    def _open_shard(self, name: str, fingerprint: str) -> tuple[PackedShard, list[int]]:
        prefix, summary = self.folder / name, self.summary
        manifest_path = shard_file(prefix, ".json")
        if not manifest_path.exists():
            raise ValueError(
                f"{prefix}: missing, but {self.index.path.name} was made with it; restore it, or run "
                "preprocess_data.py pack again and start a new run"
            )
        manifest = ShardManifest.load(manifest_path)
        header, packing, checks = read_pack(pack_path(prefix, summary.mode, summary.sequence_length))
        data = shard_file(prefix, ".bin")
        size = data.stat().st_size if data.exists() else None
        # the manifest's hashes say what .bin was; its bytes are checked sample by sample
        same = content_of(manifest) == header.content and header.fingerprint == fingerprint
        if not same or size != manifest.files[".bin"].bytes:
            raise ValueError(
                f"{prefix}: was changed or replaced since {self.index.path.name} was made; restore it, or run "
                "preprocess_data.py pack again and start a new run"
            )
        ids = np.memmap(data, np.dtype(manifest.dtype).newbyteorder("<"), mode="r").view(np.ndarray)
        shard = PackedShard(prefix, ids, packing, summary.sequence_length, checks)
        return shard, [0, *accumulate(header.strata)]


CHECKED_SHARDS = 64
"""An index of up to so many is compared with all of them when it is opened; a larger one with a few."""
CHECKED_OF_MANY = 4
"""How many are a few; the others are compared when they are first read. Each takes a third of a millisecond."""


def open_packed(
    paths: Sequence[Path | str], sequence_length: int, mode: PackingMode, *, checked: int | None = None
) -> PackedDataset:
    """Open folders of shards or single shards as one dataset of samples.

    A folder with a pack index of this mode and length is opened through it; other shards are packed in memory.

    Args:
        checked: how many shards of an index to look at now; None for all of few and a few of many.

    Raises:
        ValueError: nothing there, damaged or mixed shards, a picture that does not fit, or too much to pack in memory.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        # mode and length stand in the name, so several packings of one folder do not mix
        index = index_path(path, mode, sequence_length)
        if index.exists():
            source = IndexedSource(path, index)
            few = source.summary.shards <= CHECKED_SHARDS
            source.check((CHECKED_SHARDS if few else CHECKED_OF_MANY) if checked is None else checked)
            sources.append(source)
        else:
            sources.append(MemorySource(_open_shards(path, sequence_length, mode), sequence_length, mode))
    return PackedDataset(sources, ", ".join(map(str, paths)))


def _open_shards(path: Path, sequence_length: int, mode: PackingMode) -> list[ShardReader]:
    prefixes = shard_prefixes(path)
    option = "" if mode == "best_fit" else f" --packing {mode}"
    remedy = f"first run: preprocess_data.py pack --output {path} --sequence-length {sequence_length}{option}"
    if len(prefixes) > MAX_SHARDS:
        raise ValueError(f"{path}: {len(prefixes):,} shards are too many to pack at each start; {remedy}")
    shards, documents = [], 0
    for prefix in prefixes:
        shards.append(ShardReader(prefix))
        documents += len(shards[-1])
        if documents > MAX_DOCUMENTS:
            raise ValueError(f"{path}: more than {MAX_DOCUMENTS:,} documents to pack at each start; {remedy}")
    return shards
