"""What the engine needs of a model."""

from typing import Protocol

import torch

PADDING_DOCUMENT = -1
"""Document id of padding; nothing attends to it."""


class Stepper(Protocol):
    """Reads contexts and says what comes next. Every rank of a model makes the same calls and gets the same logits."""

    context_length: int
    """Most ids that a row may hold."""

    def prefill(self, tokens: torch.Tensor, document_ids: torch.Tensor, room: int) -> torch.Tensor:
        """Start anew with whole contexts, padded on the left.

        Args:
            tokens: int64 [streams, columns].
            document_ids: int32 of the same shape, 0 for ids and -1 for padding.
            room: most ids per stream that `decode` will add.

        Returns:
            logits after the last column, float32 [streams, vocabulary], the same on every rank.
        """

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add one id to each stream, int64 [streams]; logits after it, float32 [streams, vocabulary]."""
