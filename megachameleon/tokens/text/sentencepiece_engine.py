"""Text through a sentencepiece model.

Piece i >= 1 of the model has id `text_start + i - 1`; piece 0 is the unknown piece, which byte fallback never uses.
"""

import numpy as np
import sentencepiece

from megachameleon.tokens.text.stretches import stretches
from megachameleon.tokens.text.word_memory import WordMemory, never_joins_words
from megachameleon.tokens.vocabulary import Vocabulary

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece writes a space inside pieces; the character itself has to be spelled in bytes."""
RELEASE_PIECES = {"\n", "\t", SPACE_MARK * 2, SPACE_MARK * 4}
"""What always stands alone when text is cut as in Chameleon's release; the longest is found first."""
PROBE = "  a\t b\n\n   \u00e9\u212b "
"""Spaces at both ends, whitespace in runs, an accent and a character that NFKC would replace."""


class SentencePieceEngine:
    """A sentencepiece model that spells every text."""

    file_name = "text.model"

    def __init__(self, source: bytes, vocabulary: Vocabulary, origin: str) -> None:
        """
        Args:
            source: a serialised sentencepiece model.
            origin: where it came from, for errors.

        Raises:
            ValueError: not a sentencepiece model, without byte fallback, one that changes text, or not of the
                vocabulary's number of pieces.
        """
        self.source = source
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=source)
        except RuntimeError:
            raise ValueError(f"{origin}: not a sentencepiece model; train the text tokenizer again") from None
        num_pieces = self.processor.get_piece_size() - 1
        if num_pieces != vocabulary.num_text_ids:
            raise ValueError(
                f"{origin}: {num_pieces} text pieces, but the vocabulary beside it has {vocabulary.num_text_ids}; "
                "use the vocabulary that the tokenizer was trained with"
            )
        self.pieces = [_bytes_of(self.processor, piece) for piece in range(1, num_pieces + 1)]
        self._dtype = vocabulary.token_dtype
        self._shift = vocabulary.text_start - 1
        mark = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if not all(self.processor.is_byte(piece) for piece in mark):
            raise ValueError(f"{origin}: the model has no byte fallback, so it cannot spell every text; train it anew")
        self._mark = np.array(mark, dtype=np.int32)
        self._newline_stands_alone = all(b"\n" not in piece or piece == b"\n" for piece in self.pieces)
        # what users defined stands before the bytes
        stands_alone = {self.processor.id_to_piece(piece) for piece in range(1, self.processor.piece_to_id("<0x00>"))}
        is_cut_like_release = stands_alone == RELEASE_PIECES and never_joins_words(self.pieces)
        self._words = WordMemory(self._ids) if is_cut_like_release else None
        if b"".join(self.pieces[piece - 1] for piece in self.processor.encode(PROBE)) != PROBE.encode():
            raise ValueError(f"{origin}: the model changes text before it splits it; train the text tokenizer again")

    def encode(self, text: str) -> np.ndarray:
        """Valid Unicode text to ids [n] of `Vocabulary.token_dtype`."""
        return self._encode(text) if self._words is None else self._words.encode(text, self._dtype)

    def _encode(self, text: str) -> np.ndarray:
        encoded: list[np.ndarray] = []
        # sentencepiece would take the mark itself for a space, and decoding would give one
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                encoded.append(self._mark)
            # only there do pieces never cross the end of a line
            apart = stretches(part) if self._newline_stands_alone else [part]
            encoded += [self.processor.encode(stretch, return_type="numpy") for stretch in apart]
        pieces = encoded[0] if len(encoded) == 1 else np.concatenate(encoded)
        return (pieces + self._shift).astype(self._dtype)

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).tolist()


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, piece: int) -> bytes:
    spelling = processor.id_to_piece(piece)
    if processor.is_byte(piece):
        return bytes([int(spelling[3:5], 16)])
    return spelling.replace(SPACE_MARK, " ").encode()
