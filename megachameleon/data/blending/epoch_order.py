"""The order of one epoch of a dataset: every sample once, and every stretch made up like the whole.

The strata are drawn from in exact proportion to their sizes, so any window of an epoch has the dataset's own share of
picture tokens almost exactly; which sample of a stratum comes next is a keyed permutation. Nothing is stored.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megachameleon.data.blending.interleaving import Interleaving
from megachameleon.data.permutation import KeyedPermutation, hash_of

BLOCK_SIZE = 256
"""Draws after which the strata's quotas are exact."""


class EpochOrder:
    """Step of an epoch → sample, and back. Samples are numbered stratum by stratum."""

    def __init__(self, sizes: Sequence[int], key: Sequence[int | str]) -> None:
        """
        Args:
            sizes: samples by stratum.
        """
        self.size = sum(sizes)
        used = [number for number, size in enumerate(sizes) if size]
        self._numbers = np.array(used)
        self._sizes = [sizes[number] for number in used]
        self._starts = [0, *accumulate(self._sizes)]
        # only strata in use: an empty one has no permutation
        self._strata = Interleaving(self._sizes, (*key, "strata"), BLOCK_SIZE, self.size)
        self._within = [KeyedPermutation(sizes[number], hash_of(*key, "within", number)) for number in used]

    def __getitem__(self, step: int) -> int:
        stratum, ordinal = self._strata[step]
        return self._starts[stratum] + self._within[stratum][ordinal]

    def strata_between(self, start: int, end: int) -> np.ndarray:
        """The strata of steps start..end - 1, int64."""
        return self._numbers[self._strata.parts_between(start, end)]

    def step_of(self, sample: int) -> int:
        """The step at which a sample is drawn."""
        stratum = bisect_right(self._starts, sample) - 1
        step = self._strata.position_of(stratum, self._within[stratum].index(sample - self._starts[stratum]))
        assert step is not None, "an epoch has every sample"
        return step
