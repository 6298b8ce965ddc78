"""Documents of one shard into samples of one length: a pure function of the shard, the length and the mode.

A sample holds `sequence_length` + 1 ids, the last of which is only a label. Every id of every document stands in
exactly one sample. Documents are taken in a shuffled order, for neighbours in a shard often come from one page or show
one picture. Three modes:

* `best_fit`: whole documents. A sample begins with the document that has waited longest, and is filled with the longest
  waiting one that still fits, until none does. Documents longer than a sample are cut outside pictures, as late as
  possible, and each piece is laid like a document.
* `whole_pictures`: documents one after the other, cut where a sample ends; a picture that would be cut begins the next
  sample instead, and padding takes its place.
* `continuous`: the same without regard to pictures, so without padding.
"""

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megachameleon.data.packing.strata import NUM_STRATA, stratum_of
from megachameleon.data.permutation import shuffled
from megachameleon.tokens.vocabulary import Vocabulary

PackingMode = Literal["best_fit", "whole_pictures", "continuous"]
PACKING_MODES: tuple[PackingMode, ...] = get_args(PackingMode)
PACKING_VERSION = 2
"""Goes up when the same shard would give other samples."""
WINDOW = 1024
"""Documents that wait to be chosen from: more fill samples better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where the pieces of each sample lie in `.bin`. Samples are sorted by stratum."""

    ends: np.ndarray
    """int64 [samples + 1]: sample i has the pieces ends[i]..ends[i + 1]."""
    offsets: np.ndarray
    """int64 [pieces]: the first id of each, counted from the start of `.bin`."""
    lengths: np.ndarray
    """int32 [pieces], in ids."""
    labels: np.ndarray
    """int32 [samples]: labels with loss."""
    image_labels: np.ndarray
    """int32 [samples]: picture codes among them."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def strata(self) -> np.ndarray:
        """Samples by stratum, int64 [NUM_STRATA]."""
        return np.bincount(stratum_of(self.labels, self.image_labels), minlength=NUM_STRATA)


def require_room_for_pictures(sequence_length: int, mode: PackingMode, image_length: int) -> None:
    """Refuse samples that cannot hold a whole picture.

    Raises:
        ValueError: names the length that would do.
    """
    if mode != "continuous" and image_length > sequence_length + 1:
        raise ValueError(
            f"sequence_length={sequence_length}: a picture is {image_length} ids long and cannot be cut; "
            f"set sequence_length to {image_length - 1} or more"
        )


def pack(
    lengths: np.ndarray,
    image_counts: np.ndarray,
    image_spans: np.ndarray,
    vocabulary: Vocabulary,
    sequence_length: int,
    mode: PackingMode,
) -> Packing:
    """Lay the documents of a shard into samples.

    Args:
        lengths: ids of each document, int64 [n].
        image_counts: pictures of each document, int64 [n].
        image_spans: (start within the document, length) of all pictures, int [m, 2], in order.

    Raises:
        ValueError: a picture does not fit a sample.
    """
    capacity = sequence_length + 1
    if not len(lengths):
        empty = np.empty(0, dtype=np.int32)
        return Packing(ends=np.zeros(1, np.int64), offsets=empty, lengths=empty, labels=empty, image_labels=empty)
    if len(image_spans):
        require_room_for_pictures(sequence_length, mode, vocabulary.image_length)
    starts = np.cumsum(lengths) - lengths
    pictures = np.repeat(starts, image_counts) + image_spans[:, 0]
    if mode == "best_fit":
        offsets, sizes, ends = _whole_documents(starts, lengths, pictures, vocabulary.image_length, capacity)
    else:
        kept_whole = vocabulary.image_length if mode == "whole_pictures" else 0
        offsets, sizes, ends = _stream(starts, lengths, pictures, kept_whole, capacity)
    return _sorted_by_stratum(offsets, sizes, ends, pictures, vocabulary.codes_per_image)


def _whole_documents(
    starts: np.ndarray, lengths: np.ndarray, pictures: np.ndarray, image_length: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    fits = lengths <= capacity
    offsets, sizes = [starts[fits]], [lengths[fits]]
    for start, length in zip(starts[~fits].tolist(), lengths[~fits].tolist(), strict=True):
        mine = pictures[np.searchsorted(pictures, start) : np.searchsorted(pictures, start + length)]
        cuts = start + safe_cuts(length, mine - start, image_length, capacity)
        offsets.append(cuts[:-1])
        sizes.append(np.diff(cuts))
    all_offsets, all_sizes = np.concatenate(offsets), np.concatenate(sizes)
    # one key for all shards and runs: which samples a shard has must not depend on a run's seed
    order = shuffled(PACKING_VERSION, len(all_sizes))
    chosen, ends = _best_fit(all_sizes[order], capacity)
    order = order[chosen]
    return all_offsets[order], all_sizes[order], ends


def safe_cuts(length: int, pictures: np.ndarray, image_length: int, capacity: int) -> np.ndarray:
    """Where to cut a document into pieces of at most `capacity` ids, as late as possible, never inside a picture.

    Args:
        pictures: where they start, in order, int [n].
        image_length: ids of a picture; 0 lets them be cut.

    Returns:
        int64: 0, the cuts, and `length`.
    """
    starts = pictures.tolist()
    cuts = [0]
    while length - cuts[-1] > capacity:
        cut = cuts[-1] + capacity
        last = bisect_left(starts, cut) - 1
        # a cut that falls into a picture moves to its beginning; a picture fits a sample, so pieces go on
        if last >= 0 and cut < starts[last] + image_length:
            cut = starts[last]
        cuts.append(cut)
    return np.array([*cuts, length], dtype=np.int64)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose pieces for samples.

    Args:
        lengths: of the pieces, in the order in which they enter the window.

    Returns:
        `chosen` int64 [pieces]: pieces in the order of samples; `ends` int64 [samples + 1], as in `Packing`.
    """
    shift = max(len(lengths), 1).bit_length()  # a key orders by length, then by age
    keys = ((lengths.astype(np.int64) << shift) | np.arange(len(lengths))).tolist()
    mask = (1 << shift) - 1
    window = sorted(keys[:WINDOW])
    entered, oldest = len(window), 0
    taken = bytearray(len(keys))
    chosen: list[int] = []
    ends = [0]
    while window:
        # never runs past the end: the window still holds a piece that is not taken
        while taken[oldest]:
            oldest += 1
        # the oldest first, or documents that fit nowhere well would wait till the end
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


def _stream(
    starts: np.ndarray, lengths: np.ndarray, pictures: np.ndarray, image_length: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # one key for all shards and runs, as in _whole_documents
    order = shuffled(PACKING_VERSION, len(lengths))
    ends = np.cumsum(lengths[order])
    laid = np.empty_like(starts)
    laid[order] = ends - lengths[order]  # where each document begins in the stream
    document = np.searchsorted(starts, pictures, side="right") - 1
    laid_pictures = np.sort(laid[document] + pictures - starts[document])
    cuts = safe_cuts(int(ends[-1]), laid_pictures, image_length, capacity)
    # a piece ends where its sample or its document does
    bounds = np.union1d(cuts, np.append(0, ends))
    document = order[np.searchsorted(ends, bounds[:-1], side="right")]
    offsets = starts[document] + bounds[:-1] - laid[document]
    return offsets, np.diff(bounds), np.searchsorted(bounds, cuts)


def _sorted_by_stratum(
    offsets: np.ndarray, lengths: np.ndarray, ends: np.ndarray, pictures: np.ndarray, codes: int
) -> Packing:
    def codes_before(position: np.ndarray) -> np.ndarray:
        if not len(pictures):
            return np.zeros_like(position)
        last = np.searchsorted(pictures, position) - 1  # the last picture that begins before
        within = np.clip(position - pictures[np.maximum(last, 0)] - 1, 0, codes)
        return np.where(last < 0, 0, last * codes + within)

    piece_codes = codes_before(offsets + lengths) - codes_before(offsets + 1)  # a piece's first id is no label
    labels = _sums(lengths - 1, ends)
    image_labels = _sums(piece_codes, ends)
    # stable, so the result is the same with every sorting algorithm
    order = np.argsort(stratum_of(labels, image_labels), kind="stable")
    counts = np.diff(ends)[order]
    new_ends = np.append(0, np.cumsum(counts))
    pieces = np.arange(len(offsets)) + np.repeat(ends[:-1][order] - new_ends[:-1], counts)
    return Packing(
        ends=new_ends,
        offsets=offsets[pieces],
        lengths=lengths[pieces].astype(np.int32),
        labels=labels[order].astype(np.int32),
        image_labels=image_labels[order].astype(np.int32),
    )


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums over values[ends[i]:ends[i + 1]]."""
    total = np.append(0, np.cumsum(values))
    return np.diff(total[ends])
