"""Importing the text tokenizer of a Chameleon release, or that of a Llama with room for pictures."""

import hashlib
from pathlib import Path

from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
from megachameleon.tokens.text.llama_files import find_llama_file, is_llama_json
from megachameleon.tokens.text.llama_importing import import_llama_tokenizer
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

SOURCE_NAMES = ("text_tokenizer.json", "tokenizer/text_tokenizer.json", "tokenizer.json")
MAX_BYTES = 2**28
"""Larger files are refused unread; a tokenizer of 65,536 pieces has some 5 MB."""


def import_any_text_tokenizer(
    source: Path, folder: Path, *, num_image_codes: int | None = None, image_grid: tuple[int, int] | None = None
) -> TextTokenizer:
    """Import what `source` is: Chameleon's text_tokenizer.json, or Llama's tokenizer.model or tokenizer.json.

    Args:
        num_image_codes: with Llama's, of the image tokenizer; None: Chameleon's 8,192.
        image_grid: with Llama's, rows and columns of codes in a picture; None: Chameleon's 32 x 32.

    Raises:
        ValueError: neither, or damaged; or pictures are described that Chameleon's tokenizer has ids for already.
    """
    chameleon = Vocabulary()
    if (path := _llama_file(source)) is not None:
        codes = chameleon.num_image_codes if num_image_codes is None else num_image_codes
        return import_llama_tokenizer(
            path, folder, num_image_codes=codes, image_grid=image_grid or chameleon.image_grid
        )
    if (num_image_codes, image_grid) != (None, None):
        raise ValueError(
            f"{source}: not a Llama's tokenizer, and only that is given ids for pictures; leave out --image-codes and "
            "--image-grid"
        )
    return import_text_tokenizer(source, folder)


def _llama_file(source: Path) -> Path | None:
    """The file of a Llama's tokenizer; None: it is none."""
    # a Chameleon's folder may hold a tokenizer.json too, which is not asked then
    if source.is_dir() and any((source / name).is_file() for name in SOURCE_NAMES[:2]):
        return None
    path = find_llama_file(source)
    if path is None or path.suffix == ".model":
        return path
    small = path.stat().st_size <= MAX_BYTES
    return path if small and is_llama_json(path.read_bytes()) else None


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
