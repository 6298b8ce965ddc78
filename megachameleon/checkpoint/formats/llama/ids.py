"""Which of Llama's rows an id of a mixed-modal vocabulary has, found by how its piece is spelled."""

from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.llama_files import BYTES, UNKNOWN, find_llama_file, read_llama_model
from megachameleon.tokens.text.sentencepiece_engine import SPACE_MARK, SentencePieceEngine

NEW = -1
"""Of an id that Llama does not have."""
CONTROLS = {"bos": 1, "eos": 2}
"""transformers' ids for what config.json leaves out."""


def ids_in_llama(folder: Path, settings: dict[str, Any], tokenizer: TextTokenizer, rows: int) -> np.ndarray:
    """Llama's id for each id of the tokenizer's vocabulary, or `NEW`: int64 [vocabulary].

    Args:
        folder: with Llama's tokenizer.model or tokenizer.json.
        settings: its config.json.
        rows: of its embedding.

    Raises:
        ValueError: no tokenizer beside the model, one that is larger than the model, or not one piece in common.
    """
    path = find_llama_file(folder)
    if path is None:
        raise ValueError(f"{folder}: no tokenizer.model beside the model, so its rows mean nothing; copy it there")
    model = read_llama_model(path)
    theirs = {piece.piece: number for number, piece in enumerate(model.pieces)}
    vocabulary = tokenizer.vocabulary
    found = np.full(vocabulary.size, NEW, dtype=np.int64)
    for number, spelling in enumerate(_spellings(tokenizer)):
        found[vocabulary.text_start + number] = theirs.get(spelling, NEW)
    for field, default in CONTROLS.items():
        value = settings.get(f"{field}_token_id", default)
        first = value[0] if isinstance(value, list) and value else value  # later chat models end in several ways
        if type(first) is int and 0 <= first < len(model.pieces):
            found[getattr(vocabulary, field)] = first
    found[vocabulary.unk] = next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    if (found >= rows).any():
        raise ValueError(f"{path}: has {len(theirs):,} pieces, but the model beside it {rows:,} rows; copy both again")
    if not (found[vocabulary.text_start :] != NEW).any():
        raise ValueError(f"{path}: has no piece of the text tokenizer; make that with tools/import_tokenizer.py text")
    return found


def _spellings(tokenizer: TextTokenizer) -> list[str]:
    """Text pieces as sentencepiece spells them, in order of ids."""
    engine = tokenizer.engine
    if isinstance(engine, SentencePieceEngine):
        return [engine.processor.id_to_piece(number + 1) for number in range(len(engine.pieces))]
    return [_spelling(piece) for piece in engine.pieces]


def _spelling(piece: bytes) -> str:
    try:
        return piece.decode().replace(" ", SPACE_MARK)
    except UnicodeDecodeError:
        return BYTES[piece[0]] if len(piece) == 1 else ""
