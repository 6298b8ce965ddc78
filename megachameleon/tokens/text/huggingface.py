"""Exporting a text tokenizer as a Hugging Face folder that gives the same ids.

What a text that merely spells a special name becomes depends on who reads it. `tokenizer.json` names no added tokens,
so the `tokenizers` library finds none. transformers adds those that `tokenizer_config.json` names: its processor writes
pictures and ends of turns into the text by name, and its trainers the end of a document. Picture codes and reserved ids
are not among them, and `split_special_tokens=True` in a call keeps all of them out of text.
"""

import json
from pathlib import Path
from typing import Any

from megachameleon.files import write_json
from megachameleon.tokens.text.byte_level_checks import pieces_of
from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
from megachameleon.tokens.text.piece_names import IMAGE_PLACEHOLDER, image_placeholder, special_names
from megachameleon.tokens.text.sentencepiece_engine import SPACE_MARK, SentencePieceEngine
from megachameleon.tokens.text.sentencepiece_merges import merges_of
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import VOCABULARY_FILE, Vocabulary

UNUSED: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    # or transformers takes spaces before punctuation away when it decodes
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,  # what transformers writes for "no limit"
}


def export_text_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` for Hugging Face.

    Both `tokenizers.Tokenizer.from_file` and `transformers.AutoTokenizer` then give the ids of `tokenizer.encode`,
    after bos where special tokens are asked for; transformers in a text that spells names of special tokens only with
    `split_special_tokens=True`.

    Raises:
        ValueError: `folder` is a tokenizer folder of ours, whose `tokenizer.json` means something else; or a
            sentencepiece model that byte-pair merges cannot express.
    """
    if (folder / VOCABULARY_FILE).exists():
        raise ValueError(f"{folder}: is a tokenizer folder of its own; export into another folder")
    engine, vocabulary = tokenizer.engine, tokenizer.vocabulary
    names = exported_pieces(tokenizer)
    if isinstance(engine, SentencePieceEngine):
        fields = _sentencepiece(engine)
    else:
        assert isinstance(engine, ByteLevelEngine)
        fields = _byte_level(engine)
    fields["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    bos = names[vocabulary.bos]
    write_json(folder / "tokenizer.json", {**UNUSED, **fields, "post_processor": _template(bos, vocabulary.bos)})
    tokens = _special_tokens(names, vocabulary)
    write_json(folder / "tokenizer_config.json", {**SETTINGS, **tokens})
    # older transformers read the names from this file
    write_json(folder / "special_tokens_map.json", tokens)


def exported_pieces(tokenizer: TextTokenizer) -> list[str]:
    """What each id is called in an export, in order of ids."""
    engine, vocabulary = tokenizer.engine, tokenizer.vocabulary
    names = special_names(vocabulary)
    if isinstance(engine, SentencePieceEngine):
        last = engine.processor.get_piece_size()
        spellings = [engine.processor.id_to_piece(piece).replace(SPACE_MARK, " ") for piece in range(1, last)]
    else:
        assert isinstance(engine, ByteLevelEngine)
        spellings = engine.spellings
        names = _own_names(engine, vocabulary)
    return [*_unlike(_with_placeholder(names, vocabulary), spellings), *spellings]


def _own_names(engine: ByteLevelEngine, vocabulary: Vocabulary) -> list[str]:
    """What the engine's file calls the ids below the text: a release's sentinels are reserved ids elsewhere."""
    names = special_names(vocabulary)
    for name, i in pieces_of(json.loads(engine.source), vocabulary, engine.file_name).items():
        if 0 <= i < vocabulary.text_start:
            names[i] = name
    return names


def _with_placeholder(names: list[str], vocabulary: Vocabulary) -> list[str]:
    names = [f"<{name}>" if name == IMAGE_PLACEHOLDER else name for name in names]
    names[image_placeholder(vocabulary)] = IMAGE_PLACEHOLDER
    return names


def _unlike(names: list[str], spellings: list[str]) -> list[str]:
    """Special names, put in more brackets where training has found a text piece of the same spelling."""
    taken = set(spellings)
    while clash := taken.intersection(names):
        names = [f"<{name}>" if name in clash else name for name in names]
    return names


def _template(bos: str, bos_id: int) -> dict[str, Any]:
    """Puts bos before a text."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _special_tokens(names: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """Names by the attributes under which transformers' tokenizer and processor look for them."""
    ids = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unk,
        "sep_token": vocabulary.turn_separator,
        "image_token": image_placeholder(vocabulary),
        "boi_token": vocabulary.begin_image,
        "eoi_token": vocabulary.end_image,
    }
    # a lent unk cannot be both, and byte fallback never needs it
    if ids["image_token"] == vocabulary.unk:
        del ids["unk_token"]
    tokens: dict[str, Any] = {token: names[i] for token, i in ids.items()}
    # Releases before 5.0 do not know the last three as attributes, but find them in text by this list.
    pictures = [tokens[token] for token in ("image_token", "boi_token", "eoi_token")]
    return {**tokens, "additional_special_tokens": pictures}


def _byte_level(engine: ByteLevelEngine) -> dict[str, Any]:
    """All fields but the vocabulary."""
    file = json.loads(engine.source)
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {**file["model"], "unk_token": None}
    return {"model": model, "pre_tokenizer": file["pre_tokenizer"], "decoder": decoder}


def _sentencepiece(engine: SentencePieceEngine) -> dict[str, Any]:
    """All fields but the vocabulary.

    Spaces are written as they are, so U+2581 is a character like others, spelled in bytes as by the engine.
    """
    merges = [[part.replace(SPACE_MARK, " ") for part in parts] for parts in merges_of(engine.processor)]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": None, "merges": merges}
    # no Strip of a first space, as Llama's has: ours puts none there
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {"model": model, "pre_tokenizer": None, "decoder": decoder}
