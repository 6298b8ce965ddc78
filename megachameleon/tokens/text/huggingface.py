"""Exporting a text tokenizer as a Hugging Face folder that gives the same ids.

`tokenizer.json` names no added tokens: the library would find them in text that merely spells them, whoever loads it.
transformers adds those of `tokenizer_config.json` itself, and `split_special_tokens` there keeps them out of text.
"""

import json
from pathlib import Path
from typing import Any

from megachameleon.files import write_json
from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
from megachameleon.tokens.text.piece_names import special_names
from megachameleon.tokens.text.sentencepiece_engine import SPACE_MARK, SentencePieceEngine
from megachameleon.tokens.text.sentencepiece_merges import merges_of
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import VOCABULARY_FILE, Vocabulary

UNUSED: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,  # what transformers writes for "no limit"
}


def export_text_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` for Hugging Face.

    Both `tokenizers.Tokenizer.from_file` and `transformers.AutoTokenizer` then give the ids of `tokenizer.encode`,
    after bos where special tokens are asked for.

    Raises:
        ValueError: `folder` is a tokenizer folder of ours, whose `tokenizer.json` means something else; or a
            sentencepiece model that byte-pair merges cannot express.
    """
    if (folder / VOCABULARY_FILE).exists():
        raise ValueError(f"{folder}: is a tokenizer folder of its own; export into another folder")
    engine, vocabulary = tokenizer.engine, tokenizer.vocabulary
    if isinstance(engine, SentencePieceEngine):
        spellings, fields = _sentencepiece(engine)
    else:
        assert isinstance(engine, ByteLevelEngine)
        spellings, fields = _byte_level(engine)
    names = _unlike(special_names(vocabulary), spellings)
    fields["model"]["vocab"] = {spelling: i for i, spelling in enumerate([*names, *spellings])}
    bos = names[vocabulary.bos]
    write_json(folder / "tokenizer.json", {**UNUSED, **fields, "post_processor": _template(bos, vocabulary.bos)})
    tokens = _special_tokens(names, vocabulary)
    write_json(folder / "tokenizer_config.json", {**SETTINGS, **tokens})
    write_json(folder / "special_tokens_map.json", tokens)


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
    roles = {
        "bos_token": "bos",
        "eos_token": "eos",
        "pad_token": "pad",
        "unk_token": "unk",
        "sep_token": "turn_separator",
    }
    tokens: dict[str, Any] = {token: names[getattr(vocabulary, field)] for token, field in roles.items()}
    pictures = [names[vocabulary.begin_image], names[vocabulary.end_image]]
    return {**tokens, "additional_special_tokens": pictures}


def _byte_level(engine: ByteLevelEngine) -> tuple[list[str], dict[str, Any]]:
    """Spellings of the text pieces, and all fields but the vocabulary."""
    file = json.loads(engine.source)
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {**file["model"], "unk_token": None}
    return engine.spellings, {"model": model, "pre_tokenizer": file["pre_tokenizer"], "decoder": decoder}


def _sentencepiece(engine: SentencePieceEngine) -> tuple[list[str], dict[str, Any]]:
    """Spellings of the text pieces, and all fields but the vocabulary.

    Spaces are written as they are, so U+2581 is a character like others, spelled in bytes as by the engine.
    """
    merges = [[part.replace(SPACE_MARK, " ") for part in parts] for parts in merges_of(engine.processor)]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": None, "merges": merges}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    num_pieces = engine.processor.get_piece_size()
    spellings = [engine.processor.id_to_piece(piece).replace(SPACE_MARK, " ") for piece in range(1, num_pieces)]
    return spellings, {"model": model, "pre_tokenizer": None, "decoder": decoder}
