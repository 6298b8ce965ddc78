"""What a file of the `tokenizers` library must be to serve as the text part of a mixed-modal vocabulary."""

import json
from typing import Any, NoReturn

from megachameleon.tokens.text.piece_names import byte_letters, code_name, special_names, spelled_bytes
from megachameleon.tokens.vocabulary import Vocabulary

KNOWN_STEPS = ("Split", "Digits", "Punctuation", "ByteLevel", "UnicodeScripts", "FixedLength")
"""Steps before BPE that only cut text and never change it."""
REMEDY = "give a byte-level BPE such as Chameleon's text_tokenizer.json"


def read_byte_level(source: bytes, origin: str) -> dict[str, Any]:
    """Parse a file and check the fields that are looked at here.

    Raises:
        ValueError: not JSON, or not of this form.
    """
    try:
        file = json.loads(source)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{origin}: not valid JSON ({error}); {REMEDY}") from None
    except RecursionError:
        raise ValueError(f"{origin}: not valid JSON (nested too deeply); {REMEDY}") from None
    model = file.get("model") if isinstance(file, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{origin}: has no model.vocab of pieces and ids; {REMEDY}")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{origin}: added_tokens is not a list of pieces; {REMEDY}")
    if not all(isinstance(token.get("content"), str) and type(token.get("id")) is int for token in added):
        raise ValueError(f"{origin}: added_tokens has one without content or id; {REMEDY}")
    return file


def pieces_of(file: dict[str, Any], vocabulary: Vocabulary, origin: str) -> dict[str, int]:
    """Pieces of a file, text and special ones, and their ids.

    Raises:
        ValueError: two ids of one piece, two pieces of one id, or an added piece among the text.
    """
    pieces: dict[str, int] = dict(file["model"]["vocab"])
    for token in file.get("added_tokens") or []:
        name, i = token["content"], token["id"]
        if pieces.setdefault(name, i) != i:
            raise ValueError(
                f"{origin}: {name!r} has id {i} in added_tokens, but {pieces[name]} in model.vocab; {REMEDY}"
            )
        if i >= vocabulary.text_start:
            raise ValueError(
                f"{origin}: added_tokens has {name!r} with the text id {i}; added pieces are never looked up in text, "
                f"so the ids would differ; {REMEDY}"
            )
    names = {i: piece for piece, i in pieces.items()}
    if len(names) != len(pieces):
        twice = next(piece for piece, i in pieces.items() if names[i] != piece)
        raise ValueError(f"{origin}: {twice!r} and {names[pieces[twice]]!r} share id {pieces[twice]}; {REMEDY}")
    return pieces


def require_exact(file: dict[str, Any], origin: str) -> None:
    """Refuse what would change text, lose some of it, or draw at random.

    Raises:
        ValueError: names the field.
    """

    def refuse(field: str, value: object) -> NoReturn:
        raise ValueError(f"{origin}: {field} is {value!r}, so ids would not spell the text exactly; {REMEDY}")

    model, normalizer = file["model"], file.get("normalizer")
    if model.get("type") != "BPE":
        raise ValueError(f"{origin}: model.type is {model.get('type')!r}, not 'BPE'; {REMEDY}")
    # dropout draws at random; the others change which pieces a word becomes
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(field):
            refuse(f"model.{field}", model[field])
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        refuse("normalizer", normalizer)
    steps = steps_of(file.get("pre_tokenizer"))
    for step in steps:
        if step.get("type") not in KNOWN_STEPS or step.get("behavior") == "Removed" or step.get("add_prefix_space"):
            refuse("a step of pre_tokenizer", step)
    # bytes are letters behind this step, so steps after it would cut something else than text
    if [step["type"] == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError(f"{origin}: pre_tokenizer does not end with its only ByteLevel step; {REMEDY}")


def steps_of(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in order, out of their sequences."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    return [step for part in pre_tokenizer.get("pretokenizers") or [] for step in steps_of(part)]


def require_layout(ids: dict[str, int], vocabulary: Vocabulary, origin: str) -> None:
    """Check that special pieces, picture codes and text stand where the vocabulary says.

    Raises:
        ValueError: names the first piece that does not.
    """
    foreign = "the file is not of this vocabulary's layout"
    names = special_names(vocabulary)
    wanted = [(field, names[i], i) for field, i in vocabulary.control_ids.items()]
    wanted += [(f"code {c}", code_name(c), vocabulary.image_code_start + c) for c in range(vocabulary.num_image_codes)]
    for role, name, i in wanted:
        if ids.get(name) != i:
            found = f"has id {ids[name]}" if name in ids else "is missing"
            raise ValueError(f"{origin}: {role}: the piece {name!r} {found}, but should have id {i}; {foreign}")
    # all 256, or some text could not be spelled
    for byte, letter in enumerate(byte_letters()):
        if ids.get(letter, -1) < vocabulary.text_start:
            found = f"has id {ids[letter]}" if letter in ids else "is missing"
            raise ValueError(
                f"{origin}: the piece {letter!r} of byte {byte} {found}, but text begins at id "
                f"{vocabulary.text_start}; {foreign}"
            )
    texts = sorted(i for i in ids.values() if i >= vocabulary.text_start)
    if texts != list(range(vocabulary.text_start, vocabulary.size)):
        raise ValueError(
            f"{origin}: {len(texts):,} text pieces with ids {texts[0]} to {texts[-1]}, but the vocabulary has "
            f"{vocabulary.num_text_ids:,} with ids {vocabulary.text_start} to {vocabulary.size - 1}; {foreign}"
        )


def text_pieces(ids: dict[str, int], vocabulary: Vocabulary, origin: str) -> list[str]:
    """The pieces with text ids, in their order.

    Raises:
        ValueError: one has a character that stands for no byte.
    """
    pieces = sorted((piece for piece in ids if ids[piece] >= vocabulary.text_start), key=ids.__getitem__)
    for piece in pieces:
        try:
            spelled_bytes(piece)
        except KeyError as error:
            raise ValueError(
                f"{origin}: the piece {piece!r} has a character {error} that stands for no byte; {REMEDY}"
            ) from None
    return pieces
