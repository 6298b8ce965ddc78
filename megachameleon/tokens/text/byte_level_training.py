"""Training a byte-level BPE with the splitting of Chameleon's release, in the form of its text_tokenizer.json."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
from megachameleon.tokens.text.piece_names import special_names
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

CODE_NAMES = re.compile("IMGIMG[A-J]{1,4}Z")
"""Not trained on: a text piece must not have the name of a picture code."""


def train_byte_level(texts: Sequence[str], vocabulary: Vocabulary, folder: Path) -> TextTokenizer:
    """Train byte-level BPE on `texts` to fill the text ids of `vocabulary`, and write the tokenizer folder.

    The same texts give the same bytes.

    Raises:
        ValueError: no text, too little for so many ids, or too few ids for the bytes.
    """
    import tokenizers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    wanted = vocabulary.num_text_ids
    if not any(texts):
        raise ValueError("text: the inputs hold no text to train a tokenizer on; check --input")
    if wanted < 256:
        raise ValueError(
            f"vocabulary: {wanted} text ids, but bytes alone take 256; "
            f"use a vocabulary of {(vocabulary.text_start + 256) // 64 * 64 + 128:,} ids or more"
        )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = release_splitting()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        # all bytes, seen or not: every text must be spelled; sorted, for the set has no order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # lone surrogates become "?", since the library takes valid Unicode only
    readable = (CODE_NAMES.sub("", text.encode(errors="replace").decode()) for text in texts)
    trained.train_from_iterator(readable, trainer, len(texts))
    if (possible := trained.get_vocab_size()) < wanted:
        raise ValueError(
            f"text: too little for {wanted:,} text ids; at most {possible:,} can be learnt from it. Give more text, or "
            f"a vocabulary of {(vocabulary.text_start + possible) // 64 * 64:,} ids"
        )
    source = json.dumps(_in_layout(json.loads(trained.to_str()), vocabulary), ensure_ascii=False, indent=1).encode()
    tokenizer = TextTokenizer(ByteLevelEngine(source, vocabulary, "the trained tokenizer"), vocabulary)
    trained_on = {"texts": len(texts), "bytes": sum(len(text.encode(errors="replace")) for text in texts)}
    tokenizer.save(folder, {"trained_on": trained_on, "tokenizers": tokenizers.__version__})
    return tokenizer


def release_splitting() -> "pre_tokenizers.PreTokenizer":
    """How Chameleon's release cuts text before BPE, as llama.cpp (src/llama-vocab.cpp) transcribes its file.

    Tabs, newlines, digits and punctuation stand alone; spaces stand in fours and twos, a last one before its word.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    return Sequence(
        [
            Split(Regex("<sentinel:[0-9]+>"), "isolated"),
            # no J (digit 9), as in the release; harmless, because codes never go through text
            Split(Regex("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"), "isolated"),
            Split(Regex("([\t\n]|    |  )"), "isolated"),
            Digits(individual_digits=True),
            Punctuation("isolated"),
            ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _in_layout(file: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Text pieces moved to their ids, special ones put before them."""
    names = special_names(vocabulary)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    trained = sorted(file["model"]["vocab"], key=file["model"]["vocab"].__getitem__)
    vocab = {name: i for i, name in enumerate([*names, *trained])}
    return {
        **file,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(names)],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**file["model"], "vocab": vocab, "unk_token": None},
    }
