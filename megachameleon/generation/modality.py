"""Which ids may come next: the state machine of text and pictures, one state per row of a batch."""

from collections.abc import Sequence
from typing import Literal

import torch

from megachameleon.tokens.vocabulary import Vocabulary

Modality = Literal["text", "image", "both"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "both")
UNDECIDED = -1
"""Stands for an id that has to be drawn."""


def open_picture_start(ids: Sequence[int], vocabulary: Vocabulary) -> int | None:
    """Index of the begin-image id of a picture that `ids` leave unfinished, or None."""
    # from the end: only the last picture can be open
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] == vocabulary.end_image:
            return None
        if ids[index] == vocabulary.begin_image:
            return index
    return None


class ModalityMachine:
    """Follows each row through TEXT and IMAGE.

    TEXT allows text ids, the end of the document and, where a whole picture still fits, the begin-image id. IMAGE
    takes exactly `codes_per_image` codes; then the end-image id is forced and the row is back in TEXT. Pad, bos, unk,
    the turn separator and reserved ids are never emitted. In modality "image", TEXT allows the begin-image id only.

    Attributes, all on the CPU and of shape [rows]:
        codes: int64, codes in the open picture, -1 in TEXT.
        lengths: int64, ids so far, the prompt included.
        limits: int64, the length at which the row ends.
        pictures: int64, pictures completed since the prompt.
        finished: bool.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompts: Sequence[Sequence[int]],
        *,
        modality: Modality,
        limits: Sequence[int],
        max_pictures: int | None,
    ) -> None:
        """Read the states off the prompts.

        Raises:
            ValueError: a prompt is empty, holds a malformed picture, or ends inside one that the modality forbids.
        """
        self._vocabulary, self._modality, self._max_pictures = vocabulary, modality, max_pictures
        self.codes = torch.tensor([_open_codes(ids, vocabulary, row) for row, ids in enumerate(prompts)])
        self.lengths = torch.tensor([len(ids) for ids in prompts])
        self.limits = torch.tensor(list(limits))
        self.pictures = torch.zeros_like(self.lengths)
        self.finished = self.lengths >= self.limits
        if modality == "text" and (self.codes >= 0).any():
            row = int((self.codes >= 0).nonzero()[0])
            raise ValueError(f"prompt {row} ends inside a picture; use modality image or both, or close the picture")
        self._end_rows_without_a_next_id()

    @property
    def in_picture(self) -> torch.Tensor:
        """bool [rows]: unfinished rows whose picture is open, complete or not."""
        return (self.codes >= 0) & ~self.finished

    @property
    def may_begin(self) -> torch.Tensor:
        """bool [rows]: rows in TEXT that may begin a picture."""
        # begin, all codes and end: a picture that is cut off cannot be drawn
        fits = self.lengths + self._vocabulary.image_length <= self.limits
        more = torch.ones_like(fits) if self._max_pictures is None else self.pictures < self._max_pictures
        allowed = torch.full_like(fits, self._modality != "text")
        return allowed & fits & more & (self.codes < 0) & ~self.finished

    def forced(self) -> torch.Tensor:
        """int64 [rows]: the id that has no alternative, or UNDECIDED; finished rows get the end-of-document id."""
        ids = torch.full_like(self.codes, UNDECIDED)
        ids[self.codes == self._vocabulary.codes_per_image] = self._vocabulary.end_image
        if self._modality == "image":
            ids[self.codes < 0] = self._vocabulary.begin_image
        # last, over what the rules above say of finished rows
        ids[self.finished] = self._vocabulary.eos
        return ids

    def advance(self, ids: torch.Tensor) -> None:
        """Take one id per row, int64 [rows]; those of finished rows are ignored."""
        vocabulary, live = self._vocabulary, ~self.finished
        begins, ends = ids == vocabulary.begin_image, ids == vocabulary.end_image
        self.codes[live & vocabulary.is_image_code(ids)] += 1
        self.codes[live & begins] = 0
        self.codes[live & ends] = -1
        self.pictures[live & ends] += 1
        self.lengths[live] += 1
        self.finished |= live & ((ids == vocabulary.eos) | (self.lengths >= self.limits))
        self._end_rows_without_a_next_id()

    def _end_rows_without_a_next_id(self) -> None:
        if self._modality == "image":
            self.finished |= (self.codes < 0) & ~self.may_begin


def text_mask(vocabulary: Vocabulary) -> torch.Tensor:
    """bool [size]: what TEXT always allows, namely text ids and the end of the document."""
    mask = torch.zeros(vocabulary.size, dtype=torch.bool)
    mask[vocabulary.text_start :] = True
    mask[vocabulary.eos] = True
    return mask


def _open_codes(ids: Sequence[int], vocabulary: Vocabulary, row: int) -> int:
    if not ids:
        raise ValueError(f"prompt {row} is empty; it needs at least the begin-of-document id {vocabulary.bos}")
    start = open_picture_start(ids, vocabulary)
    if start is None:
        return -1
    codes = ids[start + 1 :]
    if len(codes) > vocabulary.codes_per_image or not all(vocabulary.is_image_code(code) for code in codes):
        raise ValueError(
            f"prompt {row}: the picture that begins at position {start} and does not end holds {len(codes)} ids, "
            f"more than {vocabulary.codes_per_image} or not all of them codes; close it or drop what is not a code"
        )
    return len(codes)
