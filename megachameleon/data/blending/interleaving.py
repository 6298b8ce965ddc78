"""Several parts drawn from in fixed proportions, spread evenly: position → (part, how many of it before), and back.

Quotas are exact, to within rounding, at every multiple of the block size, and near it in between. Nothing grows with
the number of positions.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from megachameleon.data.permutation import hash_of, random_bits

FAR = 1 << 62
"""Beyond any distance that occurs."""


class Interleaving:
    """A pure function of (weights, key, block size); with a `length`, all of it uses part i exactly in proportion."""

    def __init__(
        self, weights: Sequence[int], key: Sequence[int | str], block_size: int, length: int | None = None
    ) -> None:
        """
        Args:
            weights: whole numbers; positive in sum.
            length: number of positions; None is no end.
        """
        self.weights = tuple(weights)
        self.block_size = block_size
        self.length = length
        self._key = tuple(key)
        positive = [part for part, weight in enumerate(weights) if weight]
        self._only = positive[0] if len(positive) == 1 else None
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The part at a position, and how many of that part stand before."""
        if self._only is not None:
            return self._only, position
        block, offset = divmod(position, self.block_size)
        parts, ordinals = self._block(block)
        return int(parts[offset]), int(ordinals[offset])

    def counts_before(self, position: int) -> list[int]:
        """How many of each part stand before a position."""
        block, offset = divmod(position, self.block_size)
        counts = apportion(self.weights, block * self.block_size)
        if offset:
            parts, _ = self._block(block)
            rest = np.bincount(parts[:offset], minlength=len(counts)).tolist()
            counts = [a + b for a, b in zip(counts, rest, strict=True)]
        return counts

    def position_of(self, part: int, ordinal: int) -> int | None:
        """Where the draw of `part` stands that has `ordinal` before it; None if there is none."""
        if not self.weights[part]:
            return None
        if self._only is not None:
            return ordinal if self.length is None or ordinal < self.length else None
        low, high = 0, 1
        # shares never shrink as the count grows, so bisection finds the block
        while apportion(self.weights, high * self.block_size)[part] <= ordinal:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            below = apportion(self.weights, middle * self.block_size)[part] <= ordinal
            low, high = (middle, high) if below else (low, middle)
        if self.length is not None and low * self.block_size >= self.length:
            return None
        parts, ordinals = self._block(low)
        found = np.flatnonzero((parts == part) & (ordinals == ordinal))
        return low * self.block_size + int(found[0]) if len(found) else None

    def parts_between(self, start: int, end: int) -> np.ndarray:
        """The parts at positions start..end - 1, int64."""
        if self._only is not None:
            return np.full(end - start, self._only)
        first, last = start // self.block_size, -(-end // self.block_size)
        parts = np.concatenate([self._block(block)[0] for block in range(first, max(last, first + 1))])
        return parts[start - first * self.block_size : end - first * self.block_size]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts of a block and how many of each came before: int64 [block_size, less at the end] each."""
        cached = self._cached
        # one block is kept: positions are read nearly in order, and a block costs milliseconds
        if cached is not None and cached[0] == block:
            return cached[1:]
        start = block * self.block_size
        end = start + self.block_size if self.length is None else min(start + self.block_size, self.length)
        low, high = apportion(self.weights, start), apportion(self.weights, end)
        # cumulated shares at both ends, so rounding never adds up over blocks
        counts = np.subtract(high, low)
        # a key for each block: blocks alike would repeat one pattern through the run
        parts = self._arrange(hash_of(*self._key, block), low, counts)
        ordinals = np.empty_like(parts)
        ordinals[np.argsort(parts, kind="stable")] = np.arange(end - start) - np.repeat(
            np.cumsum(counts) - counts - low, counts
        )
        self._cached = (block, parts, ordinals)
        return self._cached[1:]

    def _arrange(self, key: int, before: Sequence[int], counts: np.ndarray) -> np.ndarray:
        """So many of each part in an order in which every stretch has about its share of each.

        Neighbouring parts make up for each other: of any half, quarter, eighth ... of a block, the parts up to any
        number have their share to within one. The parts in order are dealt out by the van der Corput sequence,
        scrambled by the key.
        """
        size = int(counts.sum())
        bits = max(size - 1, 1).bit_length()
        places = np.arange(1 << bits)
        # van der Corput in base 2: the position with its bits turned round
        reversed_bits = np.zeros_like(places)
        for bit in range(bits):
            reversed_bits |= (places >> bit & 1) << (bits - 1 - bit)
        # exclusive or with the key scrambles, and keeps halves, quarters ... together
        ranks = np.argsort(np.argsort(reversed_bits[:size] ^ (key & ((1 << bits) - 1))))
        return np.repeat(np.arange(len(counts)), counts)[ranks]


class BalancedInterleaving(Interleaving):
    """An interleaving in which also a quantity of what is drawn is spread evenly, such as its share of pictures."""

    def __init__(
        self,
        weights: Sequence[int],
        key: Sequence[int | str],
        block_size: int,
        values: Callable[[int, int, int], np.ndarray],
    ) -> None:
        """
        Args:
            values: (part, ordinal, count) → the quantity in draws ordinal..ordinal + count - 1 of a part, int [count].
        """
        super().__init__(weights, key, block_size)
        self._values = values

    def _arrange(self, key: int, before: Sequence[int], counts: np.ndarray) -> np.ndarray:
        """Of the parts that are due, next comes the one that brings the sum nearest to its mean. Whole numbers only."""
        size = int(counts.sum())
        parts = np.flatnonzero(counts)
        queues = [self._values(part, before[part], int(counts[part])).tolist() for part in parts.tolist()]
        total = sum(map(sum, queues))
        share = counts[parts]
        due = (random_bits(key, len(parts)) % np.uint64(size)).astype(np.int64)  # otherwise rare parts come last
        # times size instead of divided by it: whole numbers are the same on all machines
        heads = np.array([queue[0] for queue in queues]) * size - total
        positions = [0] * len(parts)
        excess, chosen = 0, np.empty(size, dtype=np.int64)
        for place in range(size):
            due += share
            distance = np.abs(heads + excess)
            # who is a whole turn behind the most overdue is not due
            distance[due <= due.max() - size] = FAR
            best = int(distance.argmin())
            chosen[place] = best
            excess += int(heads[best])
            due[best] -= size
            positions[best] += 1
            if positions[best] < len(queues[best]):
                heads[best] = queues[best][positions[best]] * size - total
            else:
                # its quota of this block is used up
                due[best] = -FAR
        return parts[chosen]


def apportion(weights: Sequence[int], count: int) -> list[int]:
    """Split `count` by weights into whole numbers that add up to it and never shrink as `count` grows.

    Halving the list keeps both: each share is within half the depth of the tree of the exact one. It is exact where all
    shares are whole, so a count of sum(weights) gives the weights.
    """
    before = [0, *accumulate(weights)]
    shares = [0] * len(weights)
    waiting = [(0, len(weights), count)]
    while waiting:
        start, end, share = waiting.pop()
        if end - start == 1:
            shares[start] = share
            continue
        middle = (start + end) // 2
        left, total = before[middle] - before[start], before[end] - before[start]
        # rounded to nearest in whole numbers: floats lose exactness above 2**53
        first = (2 * share * left + total) // (2 * total) if total else 0
        waiting += ((start, middle, first), (middle, end, share - first))
    return shares
