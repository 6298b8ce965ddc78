"""Files of tokenizers like Llama's as sentencepiece models: tokenizer.model, or tokenizer.json where it says the same.

Ids are the places of pieces, as in embedding and head of the model beside them.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from megachameleon.tokens.text.sentencepiece_engine import SPACE_MARK

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
"""In a Llama's folder; the first one is preferred."""
MAX_BYTES = 2**28
"""Larger files are refused unread; Llama's has half a megabyte."""
LONGEST_PIECE = 1_000
"""Characters; the longest that are in use are runs of spaces, of about a hundred."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""sentencepiece's types of pieces."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
BPE = 2
"""sentencepiece's number of this model type."""
REMEDY = f"give the {MODEL_FILE} that belongs to it"


def find_llama_file(source: Path) -> Path | None:
    """The tokenizer in a model's folder, or `source` itself if it is one; None: neither."""
    if source.is_dir():
        return next((source / name for name in (MODEL_FILE, JSON_FILE) if (source / name).is_file()), None)
    return source if source.is_file() else None


def read_llama_model(path: Path) -> Any:
    """A file's pieces in order of ids, as sentencepiece's ModelProto.

    Raises:
        ValueError: too large, damaged, or not of this kind.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are no tokenizer; give Llama's {MODEL_FILE}")
    content = path.read_bytes()
    try:
        model = _from_sentencepiece(content, path) if path.suffix == ".model" else _from_json(content, path)
    except (TypeError, AttributeError, UnicodeEncodeError) as error:  # a file of JSON may have anything anywhere
        raise ValueError(f"{path}: not a tokenizer, or a damaged one ({error}); {REMEDY}") from None
    times = Counter(piece.piece for piece in model.pieces)
    if twice := [spelling for spelling, count in times.items() if count > 1]:
        raise ValueError(f"{path}: two pieces are spelled {twice[0]!r}; give an undamaged file")
    bytes_found = {piece.piece for piece in model.pieces if piece.type == BYTE}
    # without all of them some text would become the unknown piece and be lost
    if bytes_found != set(BYTES):
        raise ValueError(f"{path}: has no piece for each byte (byte fallback), so it cannot spell every text")
    if sum(piece.type == UNKNOWN for piece in model.pieces) != 1:
        raise ValueError(f"{path}: has not exactly one unknown piece; give an undamaged file")
    return model


def _from_sentencepiece(content: bytes, path: Path) -> Any:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise ValueError(f"{path}: not a sentencepiece model, or a damaged one; give Llama's {MODEL_FILE}") from None
    if model.normalizer_spec.precompiled_charsmap or model.trainer_spec.treat_whitespace_as_suffix:
        name = model.normalizer_spec.name or "a suffix for spaces"
        raise ValueError(f"{path}: changes text before it splits it ({name}); only models that keep it can be imported")
    return model


def is_llama_json(content: bytes) -> bool:
    """Whether this is a file of the `tokenizers` library with pieces of characters and bytes, as Llama's has."""
    try:
        file = json.loads(content)
    except (ValueError, RecursionError):
        return False
    model = file.get("model") if isinstance(file, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return isinstance(vocab, dict) and BYTES[0] in vocab


def _from_json(content: bytes, path: Path) -> Any:
    """The same pieces with scores in the order of merges, where sentencepiece then merges the same pairs."""
    if not is_llama_json(content):
        raise ValueError(f"{path}: not a tokenizer of Llama's kind (BPE of characters with byte fallback); {REMEDY}")
    file = json.loads(content)
    _require_plain(file, path)
    vocab, merges = file["model"]["vocab"], _merges(file["model"].get("merges"), path)
    added = {token.get("content"): token for token in file.get("added_tokens") or [] if isinstance(token, dict)}
    ids = {**vocab, **{name: token.get("id") for name, token in added.items()}}
    # ids are rows of the embedding: a gap would shift all rows behind it
    if sorted(i for i in ids.values() if type(i) is int) != list(range(len(ids))):
        raise ValueError(f"{path}: ids of its pieces are not 0 to {len(ids) - 1}; {REMEDY}")
    scores = _scores(merges, vocab, path)
    unknown = file["model"].get("unk_token") or "<unk>"
    model = sentencepiece_model_pb2.ModelProto()
    for spelling in sorted(ids, key=ids.__getitem__):
        if spelling == unknown:
            kind = UNKNOWN
        elif spelling in BYTES:
            kind = BYTE
        elif spelling in added:
            kind = CONTROL if added[spelling].get("special") else USER_DEFINED
        else:
            kind = NORMAL if spelling in scores or len(spelling) == 1 else UNUSED
        score = scores.get(spelling, -float(len(merges) + ids[spelling])) if kind == NORMAL else 0.0
        model.pieces.add(piece=spelling, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = BPE, True
    model.normalizer_spec.name = "identity"
    return model


def _require_plain(file: dict[str, Any], path: Path) -> None:
    """Refuse what a sentencepiece model does not say in the same words."""
    model, normalizer, before = file["model"], file.get("normalizer"), file.get("pre_tokenizer")
    if model.get("type") not in (None, "BPE"):
        raise ValueError(f"{path}: model.type is {model.get('type')!r}, not 'BPE'; {REMEDY}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(field):
            raise ValueError(f"{path}: model.{field} is {model[field]!r}, which sentencepiece has not; {REMEDY}")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for step in steps:
        replaces = (
            isinstance(step, dict) and step.get("pattern") == {"String": " "} and step.get("content") == SPACE_MARK
        )
        if not replaces and step != {"type": "Prepend", "prepend": SPACE_MARK}:
            raise ValueError(f"{path}: a step of normalizer is {step!r}, which changes text; {REMEDY}")
    if before and (before.get("type"), before.get("replacement"), before.get("split")) != (
        "Metaspace",
        SPACE_MARK,
        False,
    ):
        raise ValueError(f"{path}: pre_tokenizer is {before!r}, and sentencepiece does not cut so; {REMEDY}")


def _merges(merges: Any, path: Path) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges if isinstance(merges, list) else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path}: model.merges has {merge!r}, which is no pair of pieces; {REMEDY}")
        if len(parts[0]) + len(parts[1]) > LONGEST_PIECE:  # each is cut in every place, which takes its square
            raise ValueError(f"{path}: model.merges has a piece of more than {LONGEST_PIECE:,} characters; {REMEDY}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _scores(merges: list[tuple[str, str]], vocab: dict[str, int], path: Path) -> dict[str, float]:
    """Scores of merged pieces: sentencepiece merges whatever two parts make the best piece, others rank pairs.

    Raises:
        ValueError: the pairs of a piece do not follow each other, or some of them are missing, so it is not the same.
    """
    scores: dict[str, float] = {}
    known = set(merges)
    for rank, (left, right) in enumerate(merges):
        spelling = left + right
        if spelling not in scores:
            scores[spelling] = -float(rank)
            splits = ((spelling[:i], spelling[i:]) for i in range(1, len(spelling)))
            if not all(split in known for split in splits if split[0] in vocab and split[1] in vocab):
                raise ValueError(f"{path}: merges make {spelling!r} of some of its parts only; {REMEDY}")
        # sentencepiece has one score a piece, so other merges cannot come between its pairs
        elif merges[rank - 1][0] + merges[rank - 1][1] != spelling:
            raise ValueError(f"{path}: merges of {spelling!r} stand apart, so no score ranks them; {REMEDY}")
    return scores
