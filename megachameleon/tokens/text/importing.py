"""Importing the text tokenizer of a Chameleon release."""

import hashlib
from pathlib import Path

from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

SOURCE_NAMES = ("text_tokenizer.json", "tokenizer/text_tokenizer.json", "tokenizer.json")
MAX_BYTES = 2**28
"""Larger files are refused unread; a tokenizer of 65,536 pieces has some 5 MB."""


def import_text_tokenizer(source: Path, folder: Path, vocabulary: Vocabulary | None = None) -> TextTokenizer:
    """Make a tokenizer folder of a byte-level BPE file of the `tokenizers` library; its bytes are kept as they are.

    Args:
        source: Meta's `text_tokenizer.json`, a Hugging Face `tokenizer.json`, or a folder with one of them.
        vocabulary: the layout that the file must have; Chameleon's by default.

    Raises:
        ValueError: no such file, one that does not spell text exactly, or one of another layout.
    """
    if source.is_dir():
        found = [source / name for name in SOURCE_NAMES if (source / name).is_file()]
        if not found:
            raise ValueError(f"{source}: holds none of {', '.join(SOURCE_NAMES)}; name the file itself")
        source = found[0]
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give Meta's text_tokenizer.json")
    if source.stat().st_size > MAX_BYTES:
        raise ValueError(f"{source}: {source.stat().st_size:,} bytes are no tokenizer; give Meta's text_tokenizer.json")
    vocabulary = vocabulary or Vocabulary()
    content = source.read_bytes()
    tokenizer = TextTokenizer(ByteLevelEngine(content, vocabulary, str(source)), vocabulary)
    digest = hashlib.sha256(content).hexdigest()
    tokenizer.save(folder, {"imported_from": {"file": source.name, "sha256": digest, "bytes": len(content)}})
    return tokenizer
