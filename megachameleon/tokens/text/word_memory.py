"""Remembering how words are split, for text that is cut as in Chameleon's release.

On the printable characters of ASCII all its rules amount to one short pattern, and words recur. So such text needs a
library once a word instead of once an occurrence, which is several times as fast.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from megachameleon.tokens.text.stretches import stretches

RELEASE_STEPS = (
    {"<sentinel:[0-9]+>", "(<sentinel:[0-9]+>)"},
    {"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"},
    {"([\t\n]|    |  )", r"([\t\n]|    |  )"},
    {"Digits", r"\p{N}"},
    {"Punctuation"},
    {"ByteLevel"},
)
"""The steps in order, by their pattern or else their type; some have been seen in two spellings."""
PLAIN = re.compile(r"[\t\n -~]*")
"""Text on which the release's rules amount to `WORD`."""
WORD = re.compile(r"    |  | ?[A-Za-z]+|[\t\n -~]")
"""What the rules cut plain text into; they may cut a word further, if it has the name of a picture code in it."""
MAX_WORDS = 2**17
"""Remembered at most."""
MAX_LETTERS = 64
"""Longer words, such as the lines of genomes, hardly recur and would fill the memory with their ids."""


def never_joins_words(pieces: Iterable[bytes]) -> bool:
    """Whether each piece of plain text lies within one word."""
    # single characters join nothing, and pieces beyond ASCII cannot arise in plain text
    texts = (piece.decode() for piece in pieces if len(piece) > 1 and piece.isascii())
    return all(WORD.fullmatch(text) for text in texts)


def is_release_splitting(steps: list[dict[str, Any]]) -> bool:
    """Whether the steps before BPE, one of them a ByteLevel without a space put first, are those of the release."""
    if len(steps) != len(RELEASE_STEPS):
        return False
    return all(_name(step) in names for step, names in zip(steps, RELEASE_STEPS, strict=True))


def _name(step: dict[str, Any]) -> object:
    if step["type"] == "Split":
        isolates = step.get("behavior") == "Isolated" and not step.get("invert")
        return step.get("pattern", {}).get("Regex") if isolates else None
    plain = {
        "Digits": step.get("individual_digits") is True,
        "Punctuation": step.get("behavior", "Isolated") == "Isolated",
        "ByteLevel": step.get("use_regex", True) is True,
    }
    return step["type"] if plain.get(step["type"]) else None


class WordMemory(dict[str, list[int]]):
    """Ids of words of bounded length, made when first asked for; forgets everything when it is full."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """
        Args:
            encode: the library's way from any text to ids, which cuts as the release does.
        """
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= MAX_LETTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str, dtype: type) -> np.ndarray:
        """Text to ids [n]; stretches that are not plain go to the library."""
        # line by line, so that one accent does not send a whole text to the library
        whole = [text] if self._is_plain(text) else stretches(text)
        return np.fromiter(chain.from_iterable(map(self._ids, whole)), dtype=dtype)

    def _ids(self, stretch: str) -> Iterator[int] | list[int]:
        if not self._is_plain(stretch):
            return self._encode(stretch)
        return chain.from_iterable(map(self.__getitem__, WORD.findall(stretch)))

    @staticmethod
    def _is_plain(text: str) -> bool:
        return PLAIN.fullmatch(text) is not None
