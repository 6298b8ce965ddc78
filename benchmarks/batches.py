"""Random tokens in the trainer's own samples: the same for every contestant."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import Shape
from megachameleon.data.samples import Sample, stack, to_tensors
from megachameleon.tokens.vocabulary import Vocabulary

POOL = 4
"""Different batches; step n takes batch n modulo this."""


class RandomSamples:
    """Position to sample, as the trainer's step reads them; drawn once, so that drawing is not measured."""

    def __init__(self, shape: Shape, documents: int, seed: int) -> None:
        """Draw `documents` documents of about equal length for each sample of the pool.

        Raises:
            ValueError: a document would be shorter than two ids.
        """
        if not 1 <= documents <= shape.sequence_length // 2:
            raise ValueError(f"--documents: {documents} must be between 1 and {shape.sequence_length // 2}")
        self.micro_batch_size = shape.micro_batch_size
        random = np.random.default_rng(seed)
        vocabulary = Vocabulary.compact(num_text_ids=shape.vocab - 28, num_image_codes=16, image_grid=(2, 4))
        assert vocabulary.size == shape.vocab
        bounds = np.linspace(0, shape.sequence_length + 1, documents + 1).astype(int)[1:-1]
        self._pool = [
            Sample.from_pieces(
                np.split(random.integers(0, shape.vocab, shape.sequence_length + 1), bounds),
                shape.sequence_length,
                vocabulary,
            )
            for _ in range(POOL * shape.micro_batch_size)
        ]

    def __getitem__(self, position: int, /) -> Sample:
        return self._pool[position % len(self._pool)]

    def batch(self, positions: Sequence[int], /) -> Sample:
        """Several samples, as the trainer's step reads them."""
        return stack([self[position] for position in positions])

    def step_batch(self, step: int) -> dict[str, Tensor]:
        """All samples of a step on the CPU."""
        first = step * self.micro_batch_size
        return to_tensors(self.batch(range(first, first + self.micro_batch_size)))


@dataclass(frozen=True, kw_only=True)
class PeerBatch:
    """What a peer is fed: ready on its device before the clock starts."""

    tokens: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s]."""
    loss_mask: Tensor
    """fp32 [b, s]."""
    visible: Tensor | None
    """bool [b, 1, s, s], True where a query sees a key; None for plain causality."""


def peer_batches(samples: RandomSamples, device: torch.device, *, isolate: bool) -> list[PeerBatch]:
    """The pool for a peer, which knows document boundaries only as a dense mask.

    Args:
        isolate: whether samples hold several documents.
    """
    return [_peer_batch(samples.step_batch(step), device, isolate) for step in range(POOL)]


def _peer_batch(batch: dict[str, Tensor], device: torch.device, isolate: bool) -> PeerBatch:
    visible = None
    if isolate:
        ids = batch["document_ids"]
        # before the clock starts: making the mask is no part of a peer's step
        visible = (ids[:, None, :, None] == ids[:, None, None, :]).tril().to(device)
    return PeerBatch(
        tokens=batch["tokens"].to(device),
        labels=batch["labels"].to(device),
        loss_mask=batch["loss_mask"].to(device),
        visible=visible,
    )
