"""Classifier-free guidance for pictures: which contexts the model reads for a row, and how their logits add up.

With logits f of the full context, i of its pictures only, and u of nothing but the picture that is being drawn:
u + image_guidance * (i - u) + guidance * (f - i). Without earlier pictures i = u. The logits of a row are thus a
weighted sum over streams, and a stream is one row of what the model reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megachameleon.generation.modality import open_picture_start
from megachameleon.generation.settings import GenerationSettings
from megachameleon.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What the model reads in one batch."""

    contexts: list[list[int]]
    """Ids of each stream."""
    owners: list[int]
    """The row that each stream serves; the full contexts come first, in the order of the rows."""
    scales: list[float]
    """The weight of each stream while its row is in a picture; outside, the full context alone counts."""
    guided: frozenset[int]
    """Rows with more than one stream."""

    def combine(self, logits: torch.Tensor, in_picture: torch.Tensor) -> torch.Tensor:
        """Logits float32 [streams, ids] and bool [rows] to guided logits float32 [rows, ids]; absent rows are zero."""
        rows = in_picture.size(0)
        first_extra = len(set(self.owners))
        # nothing to weigh or to fill in: the usual case of text
        if not self.guided and first_extra == rows:
            return logits
        weights = torch.tensor(
            [
                scale if bool(in_picture[owner]) else float(stream < first_extra)
                for stream, (owner, scale) in enumerate(zip(self.owners, self.scales, strict=True))
            ]
        )
        combined = logits.new_zeros(rows, logits.size(-1))
        owners = torch.tensor(self.owners, device=logits.device)
        return combined.index_add_(0, owners, weights.to(logits)[:, None] * logits)


def build_streams(
    contexts: Sequence[Sequence[int]],
    live: Sequence[int],
    in_picture: Sequence[bool],
    settings: GenerationSettings,
    vocabulary: Vocabulary,
) -> Streams:
    """The streams of the rows `live`, with guidance for those that are in a picture."""
    full = [list(contexts[row]) for row in live]
    scales = [1.0] * len(full)
    extra: list[tuple[list[int], int, float]] = []
    for index, row in enumerate(live):
        if not in_picture[row]:
            continue
        weighted = _guiding_contexts(full[index], settings, vocabulary)
        if weighted:
            # f's weight in the formula above; those of i and u come with their contexts
            scales[index] = settings.guidance
            extra.extend((context, row, scale) for context, scale in weighted)
    return Streams(
        contexts=full + [context for context, _, _ in extra],
        owners=list(live) + [row for _, row, _ in extra],
        scales=scales + [scale for _, _, scale in extra],
        guided=frozenset(row for _, row, _ in extra),
    )


def _guiding_contexts(
    ids: list[int], settings: GenerationSettings, vocabulary: Vocabulary
) -> list[tuple[list[int], float]]:
    """The contexts beside the full one and their weights; none where they would change nothing."""
    start = open_picture_start(ids, vocabulary)
    assert start is not None
    head, picture = ids[:start], ids[start:]
    kept = {vocabulary.begin_image, vocabulary.end_image}
    pictures = [i for i in head if i in kept or vocabulary.is_image_code(i)]
    # the unconditional context of the release: bos and begin-image, then the codes drawn so far
    bare = ([vocabulary.bos, *picture], 1.0 - settings.image_guidance)
    # the formula by stream: guidance f + (image_guidance - guidance) i + (1 - image_guidance) u
    if pictures:
        seen = ([vocabulary.bos, *pictures, *picture], settings.image_guidance - settings.guidance)
        # a stream of weight 0 would cost a row of every forward pass
        return [pair for pair in (seen, bare) if pair[1] != 0.0]
    return [] if settings.guidance == 1.0 else [(bare[0], 1.0 - settings.guidance)]
