"""Which samples each rank reads at each step: a pure function of the position in the blend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megachameleon.config import DataConfig, TrainingConfig
from megachameleon.data.blending.blending import BlendedSamples, FirstSamples
from megachameleon.data.blending.megatron_order import MegatronSamples
from megachameleon.data.blending.mixture import Stage
from megachameleon.data.packing.packed import PackedDataset, open_packed
from megachameleon.data.samples import Sample, to_tensors
from megachameleon.model.sequence_layout import context_chunks
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.seeding import derive_seed
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.training.lineage import Tokenizers, tokenizers_of

Batch = dict[str, Tensor]


class Samples(Protocol):
    """Positions to samples."""

    def batch(self, positions: Sequence[int], /) -> Sample:
        """The samples at these positions, as one batch [B, S]."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """All that a run reads."""

    train: BlendedSamples | MegatronSamples
    """Positions of the run to samples."""
    datasets: dict[str, PackedDataset]
    """Of training, by name."""
    validation: dict[str, FirstSamples]
    """By name."""
    vocabulary: Vocabulary
    """Of the text tokenizer that the configuration names, and of all shards."""
    tokenizers: Tokenizers
    """Fingerprints of those that made the shards."""


def open_data(data: DataConfig, training: TrainingConfig) -> TrainingData:
    """Open shards, check that they belong together, and lay out the order of the run.

    Raises:
        ValueError: a folder without complete shards, shards of another vocabulary than the tokenizer's, a context that
            a picture does not fit, or a configuration without data.
    """
    if not data.tokenizer:
        raise ValueError("data.tokenizer: missing; give the folder with vocabulary.json")
    if not data.train or not data.stages:
        raise ValueError(
            "data.train and data.stages: missing; name at least one dataset and one stage with its weights"
        )
    vocabulary = Vocabulary.load(Path(data.tokenizer))
    train = {name: _open(name, paths, data, vocabulary) for name, paths in data.train.items()}
    validation = {name: _open(name, paths, data, vocabulary) for name, paths in data.validation.items()}
    limit = training.validation_samples
    return TrainingData(
        train=_order(train, data, training),
        datasets=train,
        validation={name: FirstSamples(packed, limit) for name, packed in validation.items()},
        vocabulary=vocabulary,
        tokenizers=tokenizers_of({**train, **validation}, data),
    )


def require_enough_samples(data: TrainingData, training: TrainingConfig, *, done: int, consumed: int) -> None:
    """Refuse a run that would outlast its stages.

    Args:
        done: optimizer steps done.
        consumed: samples consumed by them, at whatever batch size.

    Raises:
        ValueError: the stages end before the run does.
    """
    needed = consumed + (training.num_steps - done) * training.global_batch_size
    available = data.train.num_samples
    if available is not None and available < needed:
        raise ValueError(
            f"data.stages: hold {available} samples, but the run needs {needed} (training.num_steps x "
            "global_batch_size); leave `samples` of the last stage empty, or append a stage"
        )


def training_batches(
    samples: Samples, start: int, num_micro_batches: int, micro_batch_size: int, context: ParallelContext
) -> Iterator[Batch]:
    """This rank's micro-batches of the global batch that begins at position `start`, on its device.

    Under context parallelism they hold this rank's part of each sequence, but the document ids of all of it.
    """
    for micro_batch in range(num_micro_batches):
        # However many ranks there are, a step reads the same positions: they are dealt out in order.
        first = start + (micro_batch * context.data_parallel + context.data_rank) * micro_batch_size
        batch = samples.batch(range(first, first + micro_batch_size))
        yield to_device(own_part(to_tensors(batch), context), context.device)


def validation_batches(
    samples: FirstSamples, start: int, num_micro_batches: int, micro_batch_size: int, context: ParallelContext
) -> Iterator[Batch]:
    """Like `training_batches`; past the end come samples without loss, so that every rank has the same number."""
    last = len(samples) - 1

    class Padded:
        def batch(self, positions: Sequence[int], /) -> Sample:
            batch = samples.batch([min(position, last) for position in positions])
            # Their labels count nothing; the pipeline only needs some input of the right shape.
            batch.loss_mask[[position > last for position in positions]] = 0
            return batch

    return training_batches(Padded(), start, num_micro_batches, micro_batch_size, context)


def own_part(batch: Batch, context: ParallelContext) -> Batch:
    """A batch of whole sequences cut down to this rank's part of them; document ids stay whole, for attention."""
    size = context.config.context_parallel
    if size == 1:
        return batch
    chunks = context_chunks(batch["tokens"].size(1), context.context_rank, size)

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:, start : start + length] for start, length in chunks], dim=1)

    return {name: tensor if name == "document_ids" else mine(tensor) for name, tensor in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to the device that computes."""
    if device.type == "cpu":
        return batch
    # Pinned, since from other memory a copy does not run beside computation.
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def _open(name: str, paths: tuple[str, ...], data: DataConfig, vocabulary: Vocabulary) -> PackedDataset:
    if not paths:
        raise ValueError(f"data: dataset {name} has no shards; give it a folder, or take it out")
    packed = open_packed(paths, data.sequence_length, data.packing)
    vocabulary.require_same(packed.vocabulary, f"data.tokenizer={data.tokenizer}", f"dataset {name}")
    return packed


def _order(
    datasets: dict[str, PackedDataset], data: DataConfig, training: TrainingConfig
) -> BlendedSamples | MegatronSamples:
    if data.order == "megatron":
        return MegatronSamples.of(
            {name: data.train[name] for name in datasets},
            data.stages[0].weights,
            num_samples=training.num_steps * training.global_batch_size,
            sequence_length=data.sequence_length,
            seed=training.seed,
            isolate_documents=data.isolate_documents,
        )
    stages = [
        Stage(num_samples=stage.samples, weights=stage.weights, by=stage.by, image_tokens=stage.image_tokens)
        for stage in data.stages
    ]
    return BlendedSamples.of(datasets, stages, derive_seed(training.seed, "data"))
