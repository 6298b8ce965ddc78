"""The token ids with which two sides are compared."""

import torch
from torch import Tensor

from megachameleon.tokens.vocabulary import Vocabulary

ROWS, LENGTH = 2, 64
CODES = 24
"""In the picture of a row."""


def some_tokens(vocab_size: int, vocabulary: Vocabulary | None = None, length: int = LENGTH) -> Tensor:
    """Ids that show every kind of mistake, the same for every checkpoint of a vocabulary: int64 [2, length].

    A row is text, a piece of a picture between its two control ids, and text. Text and codes are spread over all their
    ids, the first and the last included; among them stand all control ids. Mistakes in the rotation of positions grow
    with their distance, so a row is not short.

    Args:
        vocab_size: number of ids.
        vocabulary: what they mean; None: ids all over the range.
        length: at most the model's context.
    """
    length = min(length, LENGTH)
    # A short row has no room for a picture between texts.
    if vocabulary is None or length < LENGTH:
        return _spread(0, vocab_size, ROWS * length).view(ROWS, length)
    codes = _spread(vocabulary.image_code_start, vocabulary.image_code_end, ROWS * CODES).view(ROWS, CODES)
    controls = torch.tensor(
        [
            [vocabulary.bos, vocabulary.begin_image, vocabulary.end_image, vocabulary.turn_separator],
            [vocabulary.pad, vocabulary.begin_image, vocabulary.end_image, vocabulary.eos],
        ]
    )
    count = LENGTH - CODES - 4 - 1
    text = _spread(vocabulary.text_start, min(vocabulary.size, vocab_size), ROWS * count).view(ROWS, count)
    before, after = text.split((count // 2, count - count // 2), 1)
    unknown = torch.full((ROWS, 1), vocabulary.unk)
    first, begin, end, last = controls.split(1, 1)
    return torch.cat((first, before, begin, codes, end, unknown, after, last), 1)


def _spread(start: int, stop: int, count: int) -> Tensor:
    """Ids from the first to the last of a range at equal distances, in a drawn order."""
    ids = torch.linspace(start, stop - 1, count, dtype=torch.float64).round().long()
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
