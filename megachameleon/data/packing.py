"""Whole documents into samples of one length.

Best fit within a sliding window over a seeded permutation of the documents: a sample begins with the document that has
waited longest, and is filled with the longest waiting one that still fits, until none does. Documents that fit a sample
are never cut; longer ones are cut outside pictures, as late as possible, and each piece is laid like a document.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort

import numpy as np

from megachameleon.data.samples import Sample
from megachameleon.data.shards import Dataset

WINDOW = 256
"""Documents that wait to be chosen from: more fill samples better and mix the order less."""


class PackedDataset:
    """A dataset as samples of `sequence_length` positions: a pure function of (dataset, sequence length, seed)."""

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int) -> None:
        """
        Raises:
            ValueError: the dataset has pictures and one does not fit a sample.
        """
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        capacity = sequence_length + 1
        longest = dataset.vocabulary.image_length
        if dataset.num_images.any() and longest > capacity:
            raise ValueError(
                f"sequence_length={sequence_length}: a picture is {longest} ids long and cannot be cut; "
                f"set sequence_length to {longest - 1} or more"
            )
        documents, starts, lengths = _cut(dataset, capacity)
        order = np.random.Generator(np.random.Philox(key=_key(seed, dataset.fingerprint))).permutation(len(lengths))
        chosen, self._sample_ends = _pack(lengths[order], capacity)
        order = order[chosen]
        self._documents, self._starts, self._lengths = documents[order], starts[order], lengths[order]

    def __len__(self) -> int:
        return len(self._sample_ends)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        pieces = [
            self.dataset.document(document)[start : start + length] for document, start, length in self.pieces(index)
        ]
        return Sample.from_pieces(pieces, self.sequence_length, self.dataset.vocabulary)

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, length) that sample `index` holds, in order."""
        rows = slice(self._sample_ends[index - 1] if index else 0, self._sample_ends[index])
        columns = (self._documents[rows], self._starts[rows], self._lengths[rows])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @property
    def fill_rate(self) -> float:
        """The share of positions that hold a document."""
        return float(self._lengths.sum()) / (len(self) * (self.sequence_length + 1))

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what sample i is."""
        content = f"pack-1\n{self.dataset.fingerprint}\n{self.sequence_length}\n{self.seed}\n{WINDOW}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def _cut(dataset: Dataset, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `capacity` ids: their documents, starts and lengths, int64 [pieces] each."""
    fits = dataset.lengths <= capacity
    documents = [np.flatnonzero(fits)]
    starts = [np.zeros(len(documents[0]), dtype=np.int64)]
    lengths = [dataset.lengths[fits]]
    for document in np.flatnonzero(~fits).tolist():
        cuts = safe_cuts(int(dataset.lengths[document]), dataset.image_spans(document), capacity)
        documents.append(np.full(len(cuts) - 1, document))
        starts.append(cuts[:-1])
        lengths.append(np.diff(cuts))
    return np.concatenate(documents), np.concatenate(starts), np.concatenate(lengths)


def safe_cuts(length: int, image_spans: np.ndarray, capacity: int) -> np.ndarray:
    """Where to cut a document into pieces of at most `capacity` ids, never inside a picture.

    Args:
        image_spans: int [n, 2] of (start, length) in order, each at most `capacity` long.

    Returns:
        int64: 0, the cuts, and `length`.
    """
    starts = image_spans[:, 0].astype(np.int64)
    ends = image_spans.sum(axis=1, dtype=np.int64)
    cuts = [0]
    while length - cuts[-1] > capacity:
        cut = cuts[-1] + capacity
        picture = int(np.searchsorted(starts, cut, side="left")) - 1  # the last one that begins before the cut
        if picture >= 0 and cut < ends[picture]:
            cut = int(starts[picture])
        cuts.append(cut)
    return np.array([*cuts, length], dtype=np.int64)


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose pieces for samples.

    Args:
        lengths: of the pieces, in the order in which they enter the window.

    Returns:
        `chosen` int64 [pieces]: pieces in the order of samples; `ends` int64 [samples]: where each sample ends in it.
    """
    shift = max(len(lengths), 1).bit_length()  # a key orders by length, then by age
    keys = ((lengths.astype(np.int64) << shift) | np.arange(len(lengths))).tolist()
    mask = (1 << shift) - 1
    window = sorted(keys[:WINDOW])
    entered, oldest = len(window), 0
    taken = bytearray(len(keys))
    chosen: list[int] = []
    ends: list[int] = []
    while window:
        while taken[oldest]:
            oldest += 1
        slot = bisect_left(window, keys[oldest])
        room = capacity
        while slot >= 0:
            key = window.pop(slot)
            chosen.append(key & mask)
            taken[key & mask] = 1
            room -= key >> shift
            if entered < len(keys):
                insort(window, keys[entered])
                entered += 1
            slot = bisect_right(window, (room << shift) | mask) - 1
        ends.append(len(chosen))
    return np.array(chosen, dtype=np.int64), np.array(ends, dtype=np.int64)


def _key(seed: int, fingerprint: str) -> int:
    return int.from_bytes(hashlib.sha256(f"pack\n{seed}\n{fingerprint}".encode()).digest()[:16], "little")
