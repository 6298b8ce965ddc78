"""The text tokenizer that everything else uses, whichever engine splits the text.

Only text pieces come out of `encode`: text that spells a special token or a picture code stays text.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.files import atomic_path, write_json
from megachameleon.tokens.text.engine import TextEngine
from megachameleon.tokens.vocabulary import Vocabulary

SENTENCEPIECE_FILE = "text.model"
BYTE_LEVEL_FILE = "text.json"
"""A tokenizer folder holds one of the two."""
PROVENANCE_FILE = "tokenizer.json"
"""Where a tokenizer came from; not Hugging Face's file of that name."""


class TextTokenizer:
    """Exact on any Unicode text: `decode(encode(text)) == text`."""

    def __init__(self, engine: TextEngine, vocabulary: Vocabulary) -> None:
        """
        Args:
            engine: made for the ids of `vocabulary`.
        """
        self.engine = engine
        self.vocabulary = vocabulary
        self.fingerprint = hashlib.sha256(engine.source + vocabulary.fingerprint.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Read `vocabulary.json` and `text.model` (sentencepiece) or `text.json` (byte-level BPE) from a folder.

        Raises:
            ValueError: a file is missing, damaged, or does not belong to the other; or both kinds are there.
        """
        vocabulary = Vocabulary.load(folder)
        path = text_tokenizer_file(folder)
        if path is None:
            raise ValueError(
                f"{folder / SENTENCEPIECE_FILE}: no such file, nor {BYTE_LEVEL_FILE}; train a text tokenizer with "
                "tools/train_text_tokenizer.py or import one with tools/import_tokenizer.py"
            )
        return cls(_engine(path, vocabulary), vocabulary)

    def save(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write a tokenizer folder: the engine's file, `vocabulary.json`, and `tokenizer.json` with where it came from.

        A file of the other kind that an earlier tokenizer left in `folder` goes.
        """
        # first, for a folder with both kinds is refused
        for name in {SENTENCEPIECE_FILE, BYTE_LEVEL_FILE} - {self.engine.file_name}:
            (folder / name).unlink(missing_ok=True)
        with atomic_path(folder / self.engine.file_name) as temporary:
            temporary.write_bytes(self.engine.source)
        self.vocabulary.save(folder)
        write_json(folder / PROVENANCE_FILE, {"fingerprint": self.fingerprint, **provenance})

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos and eos.

        Raises:
            ValueError: the text holds lone surrogates, which are not Unicode text.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Text to ids [n] of `vocabulary.token_dtype`, without bos and eos: `encode` for whoever joins many.

        Raises:
            ValueError: the text holds lone surrogates, which are not Unicode text.
        """
        # ASCII is known without a look at the characters and cannot hold surrogates
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: not valid Unicode ({error.reason} at character {error.start})") from None
        return self.engine.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode_array` gives for each text."""
        return [self.encode_array(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; ids that are not text are left out, and torn characters become U+FFFD."""
        start, size = self.vocabulary.text_start, self.vocabulary.size
        spelled = b"".join(self.engine.pieces[int(i) - start] for i in ids if start <= int(i) < size)
        # joined before decoding: a character may be spread over several ids
        return spelled.decode("utf-8", errors="replace")


def require_no_tokenizer(folder: Path) -> None:
    """Refuse a folder that holds a text tokenizer, which shards may have been made with.

    Raises:
        ValueError: it does.
    """
    if (path := text_tokenizer_file(folder)) is not None:
        raise ValueError(f"{path}: a text tokenizer is there; choose another --output, or --replace it")


def text_tokenizer_file(folder: Path) -> Path | None:
    """The file of the text tokenizer in `folder`, or None where there is none.

    Raises:
        ValueError: there are two.
    """
    found = [path for name in (SENTENCEPIECE_FILE, BYTE_LEVEL_FILE) if (path := folder / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder}: holds {found[0].name} and {found[1].name}; remove the one that you do not mean")
    return found[0] if found else None


def _engine(path: Path, vocabulary: Vocabulary) -> TextEngine:
    if path.name == SENTENCEPIECE_FILE:
        from megachameleon.tokens.text.sentencepiece_engine import SentencePieceEngine

        return SentencePieceEngine(path.read_bytes(), vocabulary, origin=str(path))
    from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine

    return ByteLevelEngine(path.read_bytes(), vocabulary, origin=str(path))
