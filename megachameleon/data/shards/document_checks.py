"""Whether ids are whole documents of a vocabulary: many at once, in a few passes over the ids."""

import numpy as np

from megachameleon.tokens.vocabulary import Vocabulary

MAX_DOCUMENT_LENGTH = 2**31 - 1
"""Ids of one document; `.idx` and `.spans` count in int32."""


def find_image_spans(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Where pictures lie in a document: int32 [n, 2] of (start, length), begin and end ids included.

    Raises:
        ValueError: a picture is torn: codes or an end without a begin, too few or too many codes.
    """
    return find_pictures(ids, np.array([len(ids)]), vocabulary)[1]


def find_pictures(
    ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, *, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where pictures lie in documents that stand one after the other.

    Args:
        ids: integers of any dtype [sum of lengths].
        lengths: of the documents, int64 [n], none 0.
        first: number of the first document, for errors.

    Returns:
        Pictures by document, int64 [n], and all of them, int32 [m, 2] of (start in the document, length), begin and
        end ids included.

    Raises:
        ValueError: a picture is torn, be it by the end of a document; names the document.
    """
    starts = _picture_starts(ids, vocabulary)
    ends = np.cumsum(lengths)
    if starts is not None:
        document = np.searchsorted(ends, starts, side="right")
        if (starts + vocabulary.image_length <= ends[document]).all():
            within = starts - (ends - lengths)[document]
            spans = np.stack((within, np.full_like(within, vocabulary.image_length)), axis=1).astype(np.int32)
            return np.bincount(document, minlength=len(lengths)), spans
    raise _torn(ids, lengths, vocabulary, first)


def checked_lengths(ids: np.ndarray, lengths: np.ndarray, *, first: int = 0) -> np.ndarray:
    """`lengths` as int64, if documents of these lengths make up `ids`.

    Raises:
        ValueError: not rows of integers, an empty or a too long document, or another sum.
    """
    for name, array in (("ids", ids), ("lengths", lengths)):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"document {first}: expected a row of {name}, got shape {array.shape} of {array.dtype}")
    lengths = lengths.astype(np.int64)
    # each by itself before the sum, which could overflow
    wrong = np.flatnonzero((lengths < 1) | (lengths > min(len(ids), MAX_DOCUMENT_LENGTH)))
    if len(wrong):
        raise ValueError(
            f"document {first + wrong[0]}: {lengths[wrong[0]]:,} of {len(ids):,} ids; "
            f"a document has at least one and at most {MAX_DOCUMENT_LENGTH:,}"
        )
    if lengths.sum() != len(ids):
        raise ValueError(f"document {first} and following: {lengths.sum():,} ids by lengths, but {len(ids):,} came")
    return lengths


def require_ids(ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, *, first: int = 0) -> None:
    """Refuse ids that the vocabulary does not have; a narrower dtype would turn them into others.

    Args: as those of `find_pictures`.

    Raises:
        ValueError: names the first such id and its document.
    """
    # two quick passes in the good case; which id it is matters only for the error
    low = 0 if ids.dtype.kind == "u" else int(ids.min(initial=0))
    # uint16 cannot exceed a vocabulary of 65,536, so nothing need be read
    possible = np.iinfo(ids.dtype).max >= vocabulary.size
    if low >= 0 and not (possible and int(ids.max(initial=0)) >= vocabulary.size):
        return
    position = int(np.argmax((ids < 0) | (ids >= vocabulary.size)))
    document = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
    raise ValueError(
        f"document {first + document}: id {ids[position]} is outside the vocabulary 0..{vocabulary.size - 1}; "
        "the tokenizer does not belong to this vocabulary"
    )


def _picture_starts(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | None:
    """Positions of the pictures' begin ids, int64 [m]; None when there is anything else of a picture."""
    special = np.flatnonzero(ids < vocabulary.text_start)  # the rest, most of a text, is looked at once only
    values = ids[special]
    starts = special[values == vocabulary.begin_image]
    ends = special[values == vocabulary.end_image]
    codes = special[vocabulary.is_image_code(values)]
    number = vocabulary.codes_per_image
    if not len(starts) == len(ends) == len(codes) / number:
        return None
    # positions grow, so codes whose first and last have the right distance have no gap
    codes = codes.reshape(-1, number)
    whole = (codes[:, 0] == starts + 1) & (codes[:, -1] == starts + number) & (ends == starts + number + 1)
    return starts if whole.all() else None


def _torn(ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, first: int) -> ValueError:
    """The error that names the first document with a torn picture."""
    number, document = next(
        (number, document)
        for number, document in enumerate(np.split(ids, np.cumsum(lengths)[:-1]))
        if _picture_starts(document, vocabulary) is None
    )
    num_codes = np.count_nonzero(vocabulary.is_image_code(document))
    num_begins, num_ends = (np.count_nonzero(document == i) for i in (vocabulary.begin_image, vocabulary.end_image))
    return ValueError(
        f"document {first + number}: {num_begins} begin_image, {num_codes} picture codes and {num_ends} end_image "
        f"do not make whole pictures of {vocabulary.codes_per_image} codes"
    )
