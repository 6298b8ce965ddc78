"""Which picture codes occur: a codebook of which few are used, or data that has lost its variety, shows here."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import IMAGE, ForwardWatch


class PictureCodes(Monitor):
    """A histogram of the codes that a step learns to predict."""

    def __init__(self, watch: ForwardWatch, vocabulary: Vocabulary, every: int) -> None:
        self.watch, self.every, self.first = watch, every, vocabulary.image_code_start
        self._active = False
        self._counts = torch.zeros(vocabulary.num_image_codes, dtype=torch.float64, device=watch.context.device)
        for decoder in watch.decoders:
            if decoder.post_process:
                decoder.register_forward_pre_hook(self._count)

    def begin(self, step: int) -> None:
        """Clear."""
        self._active = step % self.every == 0
        self._counts.zero_()

    def sums(self) -> Tensor | None:
        """How often each code occurred, float64 [codes]."""
        return self._counts if self._active else None

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """See `describe_codes`."""
        return describe_codes(sums, "picture_codes")

    def _count(self, decoder: nn.Module, arguments: Any) -> None:
        if self._active and self.watch.inside:
            # Labels of text fall on some code, too, but count 0 there.
            places = (self.watch.own_labels() - self.first).clamp(0, len(self._counts) - 1)
            self._counts.index_add_(0, places, self.watch.own_modality()[IMAGE])


def describe_codes(counts: Sequence[float], name: str) -> dict[str, float]:
    """How evenly codes are used, by how often each occurred; empty if none did.

    `used`: share of the codebook that occurred. `entropy`: in bits; all codes alike would have log2 of their number.
    `most_frequent`: share of the most frequent one.
    """
    total = sum(counts)
    if not total:
        return {}
    shares = [count / total for count in counts if count]
    return {
        f"{name}/used": len(shares) / len(counts),
        f"{name}/entropy": -sum(share * math.log2(share) for share in shares),
        f"{name}/most_frequent": max(shares),
    }
