"""What the trainer reads: one sample of S positions, and how samples become a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """S positions of one or more documents, or of pieces of long ones, followed by padding."""

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
    def from_pieces(cls, pieces: Sequence[np.ndarray], sequence_length: int, vocabulary: Vocabulary) -> "Sample":
        """Lay documents [length] one after the other into S + 1 ids, the last of which is only a label.

        Args:
            pieces: ids of each document; together at most S + 1.
        """
        ids = np.full(sequence_length + 1, vocabulary.pad, dtype=np.int64)
        documents = np.full(sequence_length + 1, -1, dtype=np.int32)
        positions = np.zeros(sequence_length + 1, dtype=np.int64)
        start = 0
        for number, piece in enumerate(pieces):
            end = start + len(piece)
            assert end <= len(ids), "pieces exceed the sample"
            ids[start:end] = piece
            documents[start:end] = number
            positions[start:end] = np.arange(len(piece))
            start = end
        counts = (documents[1:] == documents[:-1]) & (documents[1:] >= 0)
        labels = np.where(counts, ids[1:], vocabulary.pad)
        return cls(
            tokens=ids[:-1],
            labels=labels,
            loss_mask=counts.astype(np.float32),
            document_ids=documents[:-1],
            position_ids=positions[:-1],
            image_mask=np.asarray(vocabulary.is_image_code(labels)),
        )


def collate(samples: Sequence[Sample]) -> "dict[str, torch.Tensor]":
    """Stack samples into tensors [batch, S] by field name, on the CPU."""
    import torch

    return {
        field.name: torch.from_numpy(np.stack([getattr(sample, field.name) for sample in samples]))
        for field in fields(Sample)
    }
