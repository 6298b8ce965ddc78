"""A sentencepiece BPE model as the ordered pairs that other libraries merge.

sentencepiece scores pieces, whichever two parts make them; others rank pairs of parts. One pair a piece is enough:
where a piece arises in a text, no merge has crossed its ends, so what happened between them is what happens in the
piece alone, and its last two parts are the same everywhere.
"""

from itertools import pairwise

import sentencepiece

from megachameleon.tokens.text.sentencepiece_engine import RELEASE_PIECES, SPACE_MARK

SPACES = {SPACE_MARK * 2: (SPACE_MARK, SPACE_MARK), SPACE_MARK * 4: (SPACE_MARK * 2, SPACE_MARK * 2)}
"""Runs that stand alone. Merged before anything else, from the left, they come out as sentencepiece finds them."""


def merges_of(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Pairs of parts, in the order of merging, as spelled in the model.

    Raises:
        ValueError: the model has pieces that stand alone beyond those of our training, or two pieces of one score.
    """
    first_byte, size = processor.piece_to_id("<0x00>"), processor.get_piece_size()
    alone = [processor.id_to_piece(piece) for piece in range(1, first_byte) if not processor.is_unused(piece)]
    if strange := set(alone) - RELEASE_PIECES:
        raise ValueError(
            f"text.model: pieces {sorted(strange)} that stand alone cannot be exported; train it with ours"
        )
    scores = {}
    for piece in range(first_byte, size):
        spelling = processor.id_to_piece(piece)
        if processor.is_byte(piece) or processor.is_unused(piece):
            continue
        # A piece with one that stands alone in it never arises.
        if not any(part in spelling for part in alone):
            scores[spelling] = processor.get_score(piece)
    if len(set(scores.values())) != len(scores):
        raise ValueError("text.model: two pieces have one score, so it is not a BPE model; train it with ours")
    merges = [SPACES[spelling] for spelling in alone if spelling in SPACES]
    for spelling in sorted(scores, key=scores.__getitem__, reverse=True):
        if len(spelling) > 1 and (parts := _last_parts(spelling, scores)):
            merges.append(parts)
    return merges


def _last_parts(spelling: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two parts from which a piece is made; None where merging never makes it."""
    parts = list(spelling)
    while len(parts) > 2:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        possible = [(score, place) for score, place in pairs if score is not None]
        if not possible:
            return None
        i = -max(possible)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if all(part in scores for part in parts) else None
