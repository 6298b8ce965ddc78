"""Text through byte-level BPE of the `tokenizers` library: Meta's text_tokenizer.json, or one trained in its form.

The library would find special and added pieces in text that merely spells them. So it is given the text pieces only:
nothing that it knows has an id below `text_start`.
"""

import json
import os

import numpy as np

from megachameleon.tokens.text.byte_level_checks import (
    pieces_of,
    read_byte_level,
    require_exact,
    require_layout,
    steps_of,
    text_pieces,
)
from megachameleon.tokens.text.piece_names import spelled_bytes
from megachameleon.tokens.text.word_memory import WordMemory, is_release_splitting
from megachameleon.tokens.vocabulary import Vocabulary


class ByteLevelEngine:
    """Gives the ids of `tokenizers.Tokenizer`, except that text never becomes a special or added piece."""

    file_name = "text.json"

    def __init__(self, source: bytes, vocabulary: Vocabulary, origin: str) -> None:
        """
        Args:
            source: a file of the `tokenizers` library with a byte-level BPE.
            origin: where it came from, for errors.

        Raises:
            ValueError: not such a file, one that changes text or draws at random, or not of the vocabulary's layout.
        """
        import tokenizers

        self.source = source
        file = read_byte_level(source, origin)
        require_exact(file, origin)
        ids = pieces_of(file, vocabulary, origin)
        require_layout(ids, vocabulary, origin)
        self.spellings = text_pieces(ids, vocabulary, origin)
        self.pieces = [spelled_bytes(spelling) for spelling in self.spellings]
        texts = {spelling: ids[spelling] for spelling in self.spellings}
        model = {**file["model"], "vocab": texts, "unk_token": None}
        # without added tokens and post-processor: the library would find or add special ids
        bare = {**file, "model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        # One process has one core here; the library's own threads would fight with the other processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{origin}: the tokenizers library refuses it ({error}); give an undamaged file") from None
        self._dtype = vocabulary.token_dtype
        self._words = WordMemory(self._ids) if is_release_splitting(steps_of(file["pre_tokenizer"])) else None

    def encode(self, text: str) -> np.ndarray:
        """Valid Unicode text to ids [n] of `Vocabulary.token_dtype`."""
        if self._words is not None:
            return self._words.encode(text, self._dtype)
        return np.array(self._ids(text), dtype=self._dtype)

    def _ids(self, text: str) -> list[int]:
        # the fast way leaves out offsets, which nobody needs here
        return self.backend.encode_batch_fast([text])[0].ids
