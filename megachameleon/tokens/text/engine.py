"""What every engine of a text tokenizer offers."""

from typing import Protocol

import numpy as np


class TextEngine(Protocol):
    """Turns text into ids of text pieces. It knows no control ids and no picture codes, so it cannot make one."""

    file_name: str
    """What its file is called in a tokenizer folder."""
    source: bytes
    """The bytes of that file."""
    pieces: list[bytes]
    """What each text piece spells in UTF-8; the first has id `Vocabulary.text_start`."""

    def encode(self, text: str) -> np.ndarray:
        """Valid Unicode text to ids [n] of `Vocabulary.token_dtype`."""
        ...
