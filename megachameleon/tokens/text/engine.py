"""What every engine of a text tokenizer offers."""

from typing import Protocol

import numpy as np


class TextEngine(Protocol):
    """Turns text into ids of text pieces. It knows no control ids and no picture codes, so it cannot make one."""

    source: bytes
    """The bytes of the file in a tokenizer folder that it was made from."""
    pieces: list[bytes]
    """What each text piece spells in UTF-8; the first has id `Vocabulary.text_start`."""

    def encode(self, text: str) -> np.ndarray:
        """Valid Unicode text to ids [n] of `Vocabulary.token_dtype`."""
        ...
