"""Which sample of which dataset stands at which position of a run.

Position → (dataset, epoch, sample) is a pure function of (seed, stages, datasets): no index arrays, no cache, no state,
and it can be turned round.

* A run is a list of stages, each with its own weights. Quotas are exact at every multiple of `block_size` (to within a
  sample or two, rounding) and near it in between, and the share of picture tokens is spread evenly. A stage may end
  anywhere and others may be appended, also with new datasets: what came before does not move, for a stage knows only
  the datasets that have weight in it.
* The n-th draw from a dataset is step (n mod size) of epoch (n div size), in the order of `EpochOrder`: every epoch
  visits each sample exactly once, and every stretch of it has the dataset's own share of picture tokens.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megachameleon.data.blending.epoch_order import EpochOrder
from megachameleon.data.blending.interleaving import BalancedInterleaving
from megachameleon.data.blending.mixture import Stage, sample_weights, whole_numbers
from megachameleon.data.packing.packed import PackedDataset
from megachameleon.data.samples import Sample

BLEND_VERSION = 3
"""Goes up when the same seed, stages and datasets would give another order."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of one dataset."""

    dataset: str
    """Its name."""
    epoch: int
    """How often all of the dataset was drawn before, from 0."""
    index: int
    """Of the sample within its `PackedDataset`."""


@dataclass(frozen=True, slots=True)
class _StageStart:
    """Where a stage begins: positions and draws consumed before it."""

    position: int
    drawn: Mapping[str, int]


class Blend:
    """The order of a run over several datasets."""

    def __init__(
        self, strata: Mapping[str, Sequence[int]], stages: Sequence[Stage], seed: int, block_size: int = 1024
    ) -> None:
        """
        Args:
            strata: samples by stratum of each dataset.
            stages: with weights by samples.
            block_size: samples after which quotas are exact.

        Raises:
            ValueError: no stage, an open-ended stage that is not the last, an unknown dataset, weights that are
                negative, not finite or all zero, or a dataset with weight and no samples.
        """
        # sorted: the order of keys in a configuration must not change the order of samples
        self.strata = {name: tuple(strata[name]) for name in sorted(strata)}
        self.sizes = {name: sum(counts) for name, counts in self.strata.items()}
        check_stages(self.sizes, stages)
        self.stages = tuple(stages)
        self.seed = seed
        self.block_size = block_size
        # only those with weight, so a dataset of a later stage cannot move this one
        self._names = [tuple(name for name in self.sizes if stage.weights.get(name)) for stage in stages]
        self._weights = [
            whole_numbers({name: stage.weights[name] for name in names})
            for stage, names in zip(stages, self._names, strict=True)
        ]
        self._epochs: dict[str, tuple[int, EpochOrder]] = {}
        start = _StageStart(0, dict.fromkeys(self.sizes, 0))
        self._starts = [start]
        self._orders: list[BalancedInterleaving] = []
        for number, stage in enumerate(stages):
            weights = list(self._weights[number].values())
            self._orders.append(
                BalancedInterleaving(weights, (seed, "stage", number), block_size, partial(self._strata_of, number))
            )
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
        stage = self.stage_of(position)
        start = self._starts[stage]
        number, ordinal = self._orders[stage][position - start.position]
        name = self._names[stage][number]
        epoch, step = divmod(start.drawn[name] + ordinal, self.sizes[name])
        return Draw(name, epoch, self._epoch(name, epoch)[step])

    def position_of(self, draw: Draw) -> int | None:
        """Where a draw stands; None if the run does not reach it."""
        nth = draw.epoch * self.sizes[draw.dataset] + self._epoch(draw.dataset, draw.epoch).step_of(draw.index)
        for stage, names in enumerate(self._names):
            start, end = self._starts[stage], self._starts[stage + 1 : stage + 2]
            if draw.dataset not in names or (end and nth >= end[0].drawn[draw.dataset]):
                continue
            within = self._orders[stage].position_of(names.index(draw.dataset), nth - start.drawn[draw.dataset])
            return None if within is None else start.position + within
        return None

    def positions_of(self, dataset: str, index: int, end: int) -> Iterator[int]:
        """All positions before `end` where a sample is read, one for each epoch of its dataset, in order of epochs."""
        last, rest = divmod(self.drawn_before(end)[dataset], self.sizes[dataset])
        for epoch in range(last + (rest > 0)):
            position = self.position_of(Draw(dataset, epoch, index))
            if position is not None and position < end:
                yield position

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before a position; divide by `sizes` for epochs."""
        if position == 0:
            return dict.fromkeys(self.sizes, 0)
        stage = self.stage_of(position - 1)
        return self._drawn_until(stage, position - self._starts[stage].position)

    def stage_bounds(self, end: int) -> list[tuple[int, int]]:
        """First position and one past the last of the stages that begin before `end`."""
        starts = [start.position for start in self._starts[: len(self.stages)] if start.position < end]
        return list(zip(starts, [*starts[1:], end], strict=True))

    def names_before(self, position: int) -> list[str]:
        """The datasets, sorted, that have weight in a stage that begins before `position`."""
        # one start more than stages, unless the last stage is open-ended
        begun = [names for names, start in zip(self._names, self._starts, strict=False) if start.position < position]
        return sorted({name for names in begun for name in names})

    def history_fingerprint(self, position: int) -> str:
        """A hash of all that decides the draws before `position`: equal hashes mean an equal past.

        Later stages, their datasets, and how long the stage at `position` goes on, do not matter.
        """
        past = []
        for stage, start, weights in zip(self.stages, self._starts, self._weights, strict=False):
            if start.position < position:
                end = position if stage.num_samples is None else min(position, start.position + stage.num_samples)
                # the end is the position itself, so that a longer num_steps still has an equal past
                past.append([end, [[name, str(weight)] for name, weight in weights.items()]])
        strata = [[name, self.strata[name]] for name in self.names_before(position)]
        return _fingerprint(["blend", BLEND_VERSION, self.seed, self.block_size, strata, past])

    def stage_of(self, position: int) -> int:
        """The number of the stage that a position belongs to."""
        if position < 0 or (self.num_samples is not None and position >= self.num_samples):
            raise IndexError(f"position {position} of a run of {self.num_samples} samples")
        starts = [start.position for start in self._starts[: len(self.stages)]]
        return max(number for number, start in enumerate(starts) if start <= position)

    def _epoch(self, name: str, epoch: int) -> EpochOrder:
        cached = self._epochs.get(name)
        # one epoch of each dataset is kept: draws of a dataset go forwards
        if cached is None or cached[0] != epoch:
            cached = self._epochs[name] = (epoch, EpochOrder(self.strata[name], (self.seed, "epoch", name, epoch)))
        return cached[1]

    def _strata_of(self, stage: int, part: int, ordinal: int, count: int) -> np.ndarray:
        """The strata of `count` draws of a stage from one of its datasets, from draw `ordinal` on."""
        name = self._names[stage][part]
        size, first = self.sizes[name], self._starts[stage].drawn[name] + ordinal
        pieces = []
        while count:
            epoch, step = divmod(first, size)
            end = min(step + count, size)
            pieces.append(self._epoch(name, epoch).strata_between(step, end))
            first, count = first + end - step, count - (end - step)
        return np.concatenate(pieces)

    def _drawn_until(self, stage: int, count: int) -> dict[str, int]:
        """How many of each dataset stand before the stage and among its first `count` samples."""
        before = self._starts[stage].drawn
        counts = zip(self._names[stage], self._orders[stage].counts_before(count), strict=True)
        return {**before, **{name: before[name] + more for name, more in counts}}


class BlendedSamples:
    """Position → sample, for every rank alike."""

    def __init__(self, blend: Blend, datasets: Mapping[str, PackedDataset]) -> None:
        """
        Raises:
            ValueError: names or sizes are not the blend's, or vocabularies or sequence lengths differ.
        """
        strata = {name: tuple(dataset.strata) for name, dataset in datasets.items()}
        if strata != blend.strata:
            raise ValueError(f"blend: made for datasets of sizes {blend.strata}, got {strata}")
        (first_name, first), *others = datasets.items()
        for name, other in others:
            first.vocabulary.require_same(other.vocabulary, first_name, name)
            if first.sequence_length != other.sequence_length:
                raise ValueError(
                    f"blend: {first_name} is packed for sequence_length={first.sequence_length} and {name} for "
                    f"{other.sequence_length}; pack them alike"
                )
        self.blend = blend
        self.datasets = dict(datasets)
        self.vocabulary, self.sequence_length = first.vocabulary, first.sequence_length

    @classmethod
    def of(cls, datasets: Mapping[str, PackedDataset], stages: Sequence[Stage], seed: int) -> "BlendedSamples":
        """Blend datasets.

        Raises:
            ValueError: as `Blend`, or a stage asks for picture tokens that the datasets cannot give.
        """
        check_stages({name: len(dataset) for name, dataset in datasets.items()}, stages)
        # `Blend` counts samples alone, so shares of tokens become shares of samples first
        resolved = [
            Stage(stage.num_samples, sample_weights(stage, datasets, f"data.stages[{number}]"))
            for number, stage in enumerate(stages)
        ]
        return cls(Blend({name: dataset.strata for name, dataset in datasets.items()}, resolved, seed), datasets)

    @property
    def num_samples(self) -> int | None:
        """Length of the run; None if the last stage is open-ended."""
        return self.blend.num_samples

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before a position."""
        return self.blend.drawn_before(position)

    def __getitem__(self, position: int) -> Sample:
        draw = self.blend[position]
        return self.datasets[draw.dataset][draw.index]

    def batch(self, positions: Sequence[int]) -> Sample:
        """The samples at several positions as one batch [B, S]."""
        # documents are laid straight into the batch: stacking samples would copy each once more
        batch = Sample.empty(len(positions), self.sequence_length)
        for row, position in enumerate(positions):
            draw = self.blend[position]
            batch.row(row).lay(*self.datasets[draw.dataset].read(draw.index), self.vocabulary)
        return batch

    def history(self, position: int) -> str:
        """What decided all samples before `position`, as JSON: their order, and the datasets that they came from.

        Datasets that only later stages draw from may be added, changed or removed.
        """
        used = {name: self.datasets[name].identity for name in self.blend.names_before(position)}
        return json.dumps({"order": self.blend.history_fingerprint(position), "datasets": used}, sort_keys=True)


class FirstSamples:
    """The first samples of a dataset in an order that is the same in every run, for validation."""

    def __init__(self, dataset: PackedDataset, num_samples: int | None = None) -> None:
        """
        Args:
            num_samples: at most this many; None for all.
        """
        self.dataset = dataset
        # a key without a seed, so that validation losses of any two runs can be compared
        self._order = EpochOrder(dataset.strata, ("first samples",))
        self._length = len(dataset) if num_samples is None else min(num_samples, len(dataset))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self.dataset[self._order[index]]

    def batch(self, indices: Sequence[int]) -> Sample:
        """Several of them as one batch [B, S]."""
        batch = Sample.empty(len(indices), self.dataset.sequence_length)
        for row, index in enumerate(indices):
            batch.row(row).lay(*self.dataset.read(self._order[index]), self.dataset.vocabulary)
        return batch


def what_changed(then: str, today: str) -> str:
    """Say in words why two histories differ."""
    try:
        was, are = json.loads(then)["datasets"], json.loads(today)["datasets"]
    except (ValueError, TypeError, KeyError):
        return "it was saved by an earlier version, which ordered samples otherwise"
    parts = []
    for name in sorted(was.keys() & are.keys()):
        if was[name] != are[name]:
            # an identity is a fingerprint, then what a person can compare
            (_, _, before), (_, _, now) = was[name].partition(" "), are[name].partition(" ")
            parts.append(f"dataset {name} has other shards or packing ({now}; it had {before})")
    parts += [f"dataset {name} is gone" for name in was if name not in are]
    parts += [f"dataset {name} is new" for name in are if name not in was]
    return "; ".join(parts) or "the seed, sequence_length, data.order or the weights of a stage are other ones"


def _fingerprint(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def check_stages(sizes: Mapping[str, int], stages: Sequence[Stage]) -> None:
    """Refuse stages that make no sense for datasets of these sizes.

    Raises:
        ValueError: as `Blend`.
    """
    if not stages:
        raise ValueError("stages: empty; give at least one stage with weights")
    for number, stage in enumerate(stages):
        if stage.num_samples is None and number != len(stages) - 1:
            raise ValueError(f"stages[{number}].num_samples: missing; only the last stage may be open-ended")
        if stage.num_samples is not None and stage.num_samples < 1:
            raise ValueError(f"stages[{number}].num_samples={stage.num_samples}: must be at least 1")
        for name, weight in stage.weights.items():
            _check_weight(f"stages[{number}].weights", name, float(weight), sizes)
        if not any(stage.weights.values()):
            raise ValueError(f"stages[{number}].weights: all zero; give at least one dataset a positive weight")


def _check_weight(where: str, name: str, weight: float, sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        # a misspelled name is the usual reason
        close = difflib.get_close_matches(name, sizes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(sizes))}"
        raise ValueError(f"{where}: unknown dataset {name!r}; {hint}")
    if not (0 <= weight < float("inf")):
        raise ValueError(f"{where}: {name}={weight} must be a finite number of at least 0")
    if weight and sizes[name] < 1:
        raise ValueError(f"{where}: {name} has weight {weight} but no samples; check its shards")
