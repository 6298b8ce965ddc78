"""What a model is, in words: its shape, its family, what its ids mean."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megachameleon.checkpoint.formats.plain import MOST_LAYERS
from megachameleon.checkpoint.inspection.report import Facts
from megachameleon.config import ModelConfig, load_config
from megachameleon.tokens.vocabulary import Vocabulary

FAMILIES = {"Chameleon 7B": "chameleon_7b", "Chameleon 34B": "chameleon_34b"}
SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "norm_order")
LARGEST_SIZE = 1 << 31


def require_sensible(model: ModelConfig, origin: str) -> None:
    """Refuse a shape that would take all memory to be written down.

    Raises:
        ValueError: a size is none of a model.
    """
    sizes = (model.vocab_size, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads)
    if not 0 < model.num_layers <= MOST_LAYERS or not all(0 < size < LARGEST_SIZE for size in sizes):
        raise ValueError(f"{origin}: {model.num_layers} layers of sizes {sizes}: not the shape of a model")


def family_of(model: ModelConfig) -> str:
    """The published model of this shape, or that it is none."""
    for name, preset in FAMILIES.items():
        known = load_config(preset).model
        if all(getattr(known, field) == getattr(model, field) for field in SHAPE):
            return name
        # Cut to a few layers for tests, or with more ids, it is still that family.
        if replace(known, num_layers=model.num_layers) == replace(model, vocab_size=known.vocab_size):
            return f"{name}'s shape, but {model.num_layers} layer{'s' if model.num_layers > 1 else ''}"
    return "of its own shape"


def model_facts(model: ModelConfig) -> Facts:
    """The shape of a decoder."""
    return {
        "family": family_of(model),
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_attention_heads,
        "key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "ffn": model.ffn_hidden_size,
        "norm_order": model.norm_order,
        "norm_eps": model.norm_eps,
        "qk_norm": model.qk_norm,
        "qk_norm_groups": model.qk_norm_groups if model.qk_norm != "none" else 0,
        "rope_theta": model.rope_theta,
        "context_length": model.context_length,
        "vocabulary_rows": model.vocab_size,
    }


def vocabulary_facts(values: Mapping[str, Any] | None, tokenizers: Mapping[str, str | None]) -> Facts:
    """What ids mean and which tokenizers made the data."""
    facts: Facts = {"known": values is not None}
    if values is not None:
        try:
            vocabulary = Vocabulary.from_dict(dict(values), "vocabulary")
        except ValueError as error:
            facts["problem"] = str(error)
        else:
            facts |= {
                "layout": "Chameleon's" if vocabulary == Vocabulary() else "of its own",
                "ids": vocabulary.size,
                "text_ids": vocabulary.num_text_ids,
                "picture_codes": vocabulary.num_image_codes,
                "picture_grid": list(vocabulary.image_grid),
                "fingerprint": vocabulary.fingerprint,
            }
    for name in ("text", "image"):
        facts[f"{name}_tokenizer"] = tokenizers.get(name)
    return facts
