"""Tokenizers in the form of Llama's, trained on a few texts: BPE, byte fallback, a space put first, control pieces."""

import email
import io
from pathlib import Path

import sentencepiece

WORDS = ["Grüße aus Köln, 你好 2024", "a  b   c    d\tof the model"]


def train_like_llama(pieces=500, *, user_defined=(), **options):
    """Bytes of a tokenizer.model."""
    folder = Path(email.__file__).parent
    texts = [line for path in sorted(folder.glob("*.py")) for line in path.read_text().splitlines()] + WORDS * 5
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": pieces,
        "character_coverage": 0.9999,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
        "user_defined_symbols": list(user_defined),
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()
