"""Making a text tokenizer of ours of Llama's: its pieces in their order, in a vocabulary with room for pictures.

What differs: nothing is put before a text and no space is taken away, so every text comes back; Llama's own puts a
space before the first word, which here is written where it is meant. The vocabulary's control ids replace its control
pieces.
"""

import hashlib
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megachameleon.tokens.text.llama_files import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, read_llama_model
from megachameleon.tokens.text.sentencepiece_engine import SentencePieceEngine
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary


def import_llama_tokenizer(
    source: Path, folder: Path, *, num_image_codes: int, image_grid: tuple[int, int]
) -> TextTokenizer:
    """Write a tokenizer folder of ours.

    Args:
        source: tokenizer.model (sentencepiece) or tokenizer.json (BPE with byte fallback).
        num_image_codes: of the image tokenizer that the model will see pictures by.
        image_grid: rows and columns of codes in a picture.

    Raises:
        ValueError: damaged, or it cannot spell every text exactly.
    """
    model = read_llama_model(source)
    kept = exact_model(model)
    vocabulary = Vocabulary.extended(
        num_text_ids=len(kept.pieces) - 1, num_image_codes=num_image_codes, image_grid=image_grid
    )
    # deterministic: the fingerprint is a hash of these bytes
    engine = SentencePieceEngine(kept.SerializeToString(deterministic=True), vocabulary, str(source))
    tokenizer = TextTokenizer(engine, vocabulary)
    content = source.read_bytes()
    record = {"file": source.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    left_out = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    never = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer.save(folder, {"imported_from": record, "control_pieces": left_out, "never_in_text": never})
    return tokenizer


def exact_model(model: Any) -> Any:
    """A sentencepiece model that splits text as this one does, but changes nothing of it and knows no control pieces.

    Pieces that a user has defined, which stand alone wherever text spells them (`<|im_start|>`), keep their ids and are
    never found: text does not become a special token.
    """
    result = sentencepiece_model_pb2.ModelProto()
    result.trainer_spec.model_type = model.trainer_spec.model_type
    result.trainer_spec.byte_fallback = True
    ids = result.trainer_spec
    ids.unk_id, ids.bos_id, ids.eos_id, ids.pad_id = 0, -1, -1, -1
    result.normalizer_spec.name = "identity"
    result.normalizer_spec.add_dummy_prefix = False
    result.normalizer_spec.remove_extra_whitespaces = False
    # pieces are spelled with U+2581 for a space
    result.normalizer_spec.escape_whitespaces = True
    result.pieces.extend(piece for piece in model.pieces if piece.type == UNKNOWN)  # the engine wants it first
    result.pieces.extend(piece for piece in model.pieces if piece.type not in (UNKNOWN, CONTROL))
    for piece in result.pieces:
        piece.type = UNUSED if piece.type == USER_DEFINED else piece.type
    result.trainer_spec.vocab_size = len(result.pieces)
    return result
