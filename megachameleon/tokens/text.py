"""Text to ids of the mixed-modal vocabulary and back, through a sentencepiece BPE model.

Piece i >= 1 of the model has id `text_start + i - 1`; piece 0 is the unknown piece, which byte fallback never uses.
Only text pieces come out of `encode`: text that spells a special token stays text.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megachameleon.tokens.vocabulary import Vocabulary

MODEL_FILE = "text.model"
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece writes a space inside pieces; the character itself has to be spelled in bytes."""


class TextTokenizer:
    """Exact on any Unicode text: `decode(encode(text)) == text`."""

    def __init__(self, model: bytes, vocabulary: Vocabulary, origin: str) -> None:
        """
        Args:
            model: a serialised sentencepiece model.
            origin: where it came from, for errors.

        Raises:
            ValueError: not a sentencepiece model, without byte fallback, or not of the vocabulary's number of pieces.
        """
        self.vocabulary = vocabulary
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{origin}: not a sentencepiece model; train the text tokenizer again") from None
        num_pieces = self._processor.get_piece_size() - 1
        if num_pieces != vocabulary.num_text_ids:
            raise ValueError(
                f"{origin}: {num_pieces} text pieces, but the vocabulary beside it has {vocabulary.num_text_ids}; "
                "use the vocabulary that the tokenizer was trained with"
            )
        self._shift = vocabulary.text_start - 1
        self._piece_bytes = [_bytes_of(self._processor, piece) for piece in range(1, num_pieces + 1)]
        self._spelled_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if not all(self._processor.is_byte(piece) for piece in self._spelled_mark):
            raise ValueError(f"{origin}: the model has no byte fallback, so it cannot spell every text; train it anew")
        self.fingerprint = hashlib.sha256(model + vocabulary.fingerprint.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Read `vocabulary.json` and `text.model` from a tokenizer folder.

        Raises:
            ValueError: a file is missing, damaged, or does not belong to the other.
        """
        vocabulary = Vocabulary.load(folder)
        path = folder / MODEL_FILE
        if not path.exists():
            raise ValueError(f"{path}: no such file; train a text tokenizer with tools/train_text_tokenizer.py")
        return cls(path.read_bytes(), vocabulary, origin=str(path))

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos and eos.

        Raises:
            ValueError: the text holds lone surrogates, which are not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: not valid Unicode ({error.reason} at character {error.start})") from None
        pieces: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            pieces += self._spelled_mark if number else []
            pieces += self._processor.encode(part)
        shift = self._shift
        return [piece + shift for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; ids that are not text are left out, and torn characters become U+FFFD."""
        start, size = self.vocabulary.text_start, self.vocabulary.size
        spelled = b"".join(self._piece_bytes[int(i) - start] for i in ids if start <= int(i) < size)
        return spelled.decode("utf-8", errors="replace")


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, piece: int) -> bytes:
    spelling = processor.id_to_piece(piece)
    if processor.is_byte(piece):
        return bytes([int(spelling[3:5], 16)])
    return spelling.replace(SPACE_MARK, " ").encode()
