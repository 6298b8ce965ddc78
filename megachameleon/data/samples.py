"""What the trainer reads: samples of S positions, one or many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """S positions of one or more documents, or of pieces of long ones, then padding. A batch has [B, S] fields."""

    tokens: np.ndarray
    """int64 [S]: input ids; padding is `pad`."""
    labels: np.ndarray
    """int64 [S]: the next id of the same document; `pad` where there is none."""
    loss_mask: np.ndarray
    """float32 [S]: 1 where the label counts. 0 at a document's last id, which would predict the next document, and at
    padding."""
    document_ids: np.ndarray
    """int32 [S]: 0, 1, 2, ... in the order of documents; -1 at padding. Attention stays within equal ids."""
    position_ids: np.ndarray
    """int64 [S]: restart at 0 in each document; 0 at padding."""
    image_mask: np.ndarray
    """bool [S]: the modality of the *label*: True where it is a picture code. Begin and end of a picture are text: they
    are single sure or chosen ids, not drawn ones."""

    @classmethod
    def empty(cls, *shape: int) -> "Sample":
        """Room for a sample (S) or a batch (B, S); the values are arbitrary."""
        return cls(
            tokens=np.empty(shape, dtype=np.int64),
            labels=np.empty(shape, dtype=np.int64),
            loss_mask=np.empty(shape, dtype=np.float32),
            document_ids=np.empty(shape, dtype=np.int32),
            position_ids=np.empty(shape, dtype=np.int64),
            image_mask=np.empty(shape, dtype=np.bool_),
        )

    def row(self, number: int) -> "Sample":
        """A sample of a batch: views, so that writing to it writes to the batch."""
        return Sample(**{field.name: getattr(self, field.name)[number] for field in fields(self)})

    def lay(self, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> None:
        """Write documents into this sample, one after the other.

        Args:
            ids: of all documents, [at most S + 1]; the last of S + 1 is only a label.
            lengths: of the documents [n]; they add up to that of `ids`.
        """
        size, total = len(self.tokens), len(ids)
        assert total <= size + 1, "documents exceed the sample"
        inputs, labels = min(total, size), total - 1
        ends = np.cumsum(lengths)
        lasts = ends[:-1] - 1  # a document's last id predicts nothing
        self.tokens[:inputs] = ids[:inputs]
        self.tokens[inputs:] = vocabulary.pad
        self.labels[:labels] = ids[1:]
        self.labels[labels:] = vocabulary.pad
        # after all labels, which took the next document's first id there
        self.labels[lasts] = vocabulary.pad
        self.loss_mask[:labels] = 1
        self.loss_mask[labels:] = 0
        self.loss_mask[lasts] = 0
        self.document_ids[:inputs] = np.repeat(np.arange(len(ends), dtype=np.int32), lengths)[:inputs]
        self.document_ids[inputs:] = -1
        np.subtract(np.arange(inputs), np.repeat(ends - lengths, lengths)[:inputs], out=self.position_ids[:inputs])
        self.position_ids[inputs:] = 0
        self.image_mask[:labels] = vocabulary.is_image_code(ids[1:])
        self.image_mask[labels:] = False
        self.image_mask[lasts] = False

    @classmethod
    def from_pieces(cls, pieces: Sequence[np.ndarray], sequence_length: int, vocabulary: Vocabulary) -> "Sample":
        """A sample of documents [length]; together they have at most S + 1 ids."""
        sample = cls.empty(sequence_length)
        sample.lay(np.concatenate(pieces), np.array([len(piece) for piece in pieces]), vocabulary)
        return sample


def stack(samples: Sequence[Sample]) -> Sample:
    """Samples as one batch [B, S]."""
    return Sample(**{field.name: np.stack([getattr(s, field.name) for s in samples]) for field in fields(Sample)})


def to_tensors(batch: Sample) -> "dict[str, torch.Tensor]":
    """The fields as tensors on the CPU, by name; they share the memory."""
    import torch

    return {field.name: torch.from_numpy(getattr(batch, field.name)) for field in fields(Sample)}
