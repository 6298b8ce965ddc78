"""Which sample of which dataset stands at which position of a run.

Position → (dataset, epoch, sample) is a pure function of (seed, stages, sizes): no index arrays, no cache, no state.

* A run is a list of stages, each with its own weights. Quotas are exact at every multiple of `block_size` (to within a
  sample or two, rounding) and near it in between. A stage may end anywhere and others may be appended, also with new
  datasets: what came before does not move, for a stage knows only the datasets that have weight in it.
* The n-th draw from a dataset is sample `permutation(n mod size)` of epoch `n div size`, with a permutation keyed by
  (seed, dataset, epoch): every epoch visits each sample exactly once.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megachameleon.data.packing import PackedDataset
from megachameleon.data.samples import Sample


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a run with one mixture."""

    num_samples: int | None
    """None: until the end of the run; only for the last stage."""
    weights: Mapping[str, float]
    """Shares of samples by dataset; they need not add up to one."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of one dataset."""

    dataset: str
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class _StageStart:
    """Where a stage begins: positions and draws consumed before it."""

    position: int
    drawn: Mapping[str, int]


class Blend:
    """The order of a run over several datasets."""

    def __init__(self, sizes: Mapping[str, int], stages: Sequence[Stage], seed: int, block_size: int = 1024) -> None:
        """
        Args:
            sizes: samples in an epoch of each dataset.
            block_size: samples after which quotas are exact.

        Raises:
            ValueError: no stage, an open-ended stage that is not the last, an unknown dataset, weights that are
                negative, not finite or all zero, or a dataset with weight and no samples.
        """
        _check_stages(sizes, stages)
        self.sizes = dict(sorted(sizes.items()))
        self.stages = tuple(stages)
        self.seed = seed
        self.block_size = block_size
        self._names = [tuple(name for name in self.sizes if stage.weights.get(name)) for stage in stages]
        self._weights = [
            [Fraction(stage.weights[name]) for name in names] for stage, names in zip(stages, self._names, strict=True)
        ]
        self._cached_block: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        start = _StageStart(0, dict.fromkeys(self.sizes, 0))
        self._starts = [start]
        for number, stage in enumerate(stages):
            if stage.num_samples is not None:
                drawn = self._drawn_until(number, stage.num_samples)
                start = _StageStart(start.position + stage.num_samples, drawn)
                self._starts.append(start)

    @property
    def num_samples(self) -> int | None:
        """Length of the run; None if the last stage is open-ended."""
        return None if self.stages[-1].num_samples is None else self._starts[-1].position

    def __getitem__(self, position: int) -> Draw:
        """What stands at a position of the run, counted over all ranks."""
        stage = self._stage_of(position)
        start = self._starts[stage]
        block, offset = divmod(position - start.position, self.block_size)
        datasets, ordinals = self._block(stage, block)
        number = int(datasets[offset])
        name = self._names[stage][number]
        epoch, step = divmod(start.drawn[name] + int(ordinals[offset]), self.sizes[name])
        key = _hash(self.seed, "epoch", name, epoch)
        return Draw(name, epoch, keyed_permutation(step, self.sizes[name], key))

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before a position; divide by `sizes` for epochs."""
        if position == 0:
            return dict.fromkeys(self.sizes, 0)
        stage = self._stage_of(position - 1)
        return self._drawn_until(stage, position - self._starts[stage].position)

    def names_before(self, position: int) -> list[str]:
        """The datasets, sorted, that have weight in a stage that begins before `position`."""
        begun = [names for names, start in zip(self._names, self._starts, strict=False) if start.position < position]
        return sorted({name for names in begun for name in names})

    def history_fingerprint(self, position: int) -> str:
        """A hash of all that decides the draws before `position`: equal hashes mean an equal past.

        Later stages, their datasets, and how long the stage at `position` goes on, do not matter.
        """
        past = []
        for stage, start, names, weights in zip(self.stages, self._starts, self._names, self._weights, strict=False):
            if start.position < position:
                end = position if stage.num_samples is None else min(position, start.position + stage.num_samples)
                past.append([end, [[n, str(w / sum(weights))] for n, w in zip(names, weights, strict=True)]])
        sizes = [[name, self.sizes[name]] for name in self.names_before(position)]
        return _fingerprint(["blend-2", self.seed, self.block_size, sizes, past])

    def _stage_of(self, position: int) -> int:
        if position < 0 or (self.num_samples is not None and position >= self.num_samples):
            raise IndexError(f"position {position} of a run of {self.num_samples} samples")
        starts = [start.position for start in self._starts[: len(self.stages)]]
        return max(number for number, start in enumerate(starts) if start <= position)

    def _drawn_until(self, stage: int, count: int) -> dict[str, int]:
        """How many of each dataset stand before the stage and among its first `count` samples."""
        block, offset = divmod(count, self.block_size)
        drawn = apportion(self._weights[stage], block * self.block_size)
        if offset:
            datasets, _ = self._block(stage, block)
            rest = np.bincount(datasets[:offset], minlength=len(drawn)).tolist()
            drawn = [a + b for a, b in zip(drawn, rest, strict=True)]
        before = self._starts[stage].drawn
        return {**before, **{n: before[n] + more for n, more in zip(self._names[stage], drawn, strict=True)}}

    def _block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The datasets of a block, and how many of that dataset the stage drew before: int64 [block_size] each.

        A dataset's number is its place among those of the stage.

        Each dataset's draws are spread evenly over the block with a random jitter, so any stretch is near the weights.
        """
        if self._cached_block is not None and self._cached_block[0] == (stage, block):
            return self._cached_block[1:]
        low = apportion(self._weights[stage], block * self.block_size)
        high = apportion(self._weights[stage], (block + 1) * self.block_size)
        random = np.random.Generator(np.random.Philox(key=_hash(self.seed, "block", stage, block)))
        counts = np.subtract(high, low)
        datasets = np.repeat(np.arange(len(counts)), counts)
        ordinals = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        ranks = ordinals - np.repeat(low, counts)
        order = np.argsort((ranks + random.random(len(ranks))) / np.repeat(counts, counts), kind="stable")
        self._cached_block = ((stage, block), datasets[order], ordinals[order])
        return self._cached_block[1:]


class BlendedSamples:
    """Position → sample, for every rank alike."""

    def __init__(self, blend: Blend, datasets: Mapping[str, PackedDataset]) -> None:
        """
        Raises:
            ValueError: names or sizes are not the blend's, or vocabularies or sequence lengths differ.
        """
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        if sizes != blend.sizes:
            raise ValueError(f"blend: made for datasets of sizes {blend.sizes}, got {sizes}")
        (first_name, first), *others = datasets.items()
        for name, other in others:
            first.dataset.vocabulary.require_same(other.dataset.vocabulary, first_name, name)
            if first.sequence_length != other.sequence_length:
                raise ValueError(
                    f"blend: {first_name} is packed for sequence_length={first.sequence_length} and {name} for "
                    f"{other.sequence_length}; pack them alike"
                )
        self.blend = blend
        self.datasets = dict(datasets)

    @classmethod
    def of(cls, datasets: Mapping[str, PackedDataset], stages: Sequence[Stage], seed: int) -> "BlendedSamples":
        """Blend datasets."""
        return cls(Blend({name: len(dataset) for name, dataset in datasets.items()}, stages, seed), datasets)

    def __getitem__(self, position: int) -> Sample:
        draw = self.blend[position]
        return self.datasets[draw.dataset][draw.index]

    def history_fingerprint(self, position: int) -> str:
        """A hash of all samples before `position`: their order, and the datasets that they came from.

        Datasets that only later stages draw from may be added, changed or removed.
        """
        used = [[name, self.datasets[name].fingerprint] for name in self.blend.names_before(position)]
        return _fingerprint([self.blend.history_fingerprint(position), used])


class FirstSamples:
    """The first samples of a dataset in a fixed order, for validation."""

    def __init__(self, dataset: PackedDataset, num_samples: int | None = None) -> None:
        """
        Args:
            num_samples: at most this many; None for all.
        """
        self.dataset = dataset
        self._length = len(dataset) if num_samples is None else min(num_samples, len(dataset))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self.dataset[index]


def apportion(weights: Sequence[Fraction], count: int) -> list[int]:
    """Split `count` by weights into whole numbers that add up to it and never shrink as `count` grows.

    Halving the list keeps both: each share is within half the depth of the tree of the exact one.
    """
    if len(weights) == 1:
        return [count]
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    first = int(count * left / total + Fraction(1, 2)) if total else 0
    return apportion(weights[:middle], first) + apportion(weights[middle:], count - first)


def keyed_permutation(index: int, size: int, key: int) -> int:
    """Where `index` goes in a permutation of range(size) that `key` chooses; needs no memory.

    A Feistel network over the next even number of bits, walked until it falls below `size`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = [_mix(key + turn) for turn in range(6)]
    while True:
        left, right = index >> half, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, 2014): 64 bits to 64 bits that look independent."""
    bits = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & bits
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & bits
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & bits
    return value ^ (value >> 31)


def _fingerprint(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _hash(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def _check_stages(sizes: Mapping[str, int], stages: Sequence[Stage]) -> None:
    if not stages:
        raise ValueError("stages: empty; give at least one stage with weights")
    for number, stage in enumerate(stages):
        if stage.num_samples is None and number != len(stages) - 1:
            raise ValueError(f"stages[{number}].num_samples: missing; only the last stage may be open-ended")
        if stage.num_samples is not None and stage.num_samples < 1:
            raise ValueError(f"stages[{number}].num_samples={stage.num_samples}: must be at least 1")
        for name, weight in stage.weights.items():
            _check_weight(f"stages[{number}].weights", name, weight, sizes)
        if not any(stage.weights.values()):
            raise ValueError(f"stages[{number}].weights: all zero; give at least one dataset a positive weight")


def _check_weight(where: str, name: str, weight: float, sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        close = difflib.get_close_matches(name, sizes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(sizes))}"
        raise ValueError(f"{where}: unknown dataset {name!r}; {hint}")
    if not (0 <= weight < float("inf")):
        raise ValueError(f"{where}: {name}={weight} must be a finite number of at least 0")
    if weight and sizes[name] < 1:
        raise ValueError(f"{where}: {name} has weight {weight} but no samples; check its shards")
