"""What config.json of a text-only model in Llama's layout says."""

from pathlib import Path
from typing import Any

from megachameleon.checkpoint.formats.huggingface.config import rope_theta
from megachameleon.checkpoint.formats.llama.qk_norm import QKNorm
from megachameleon.config import ModelConfig

UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
"""transformers' LlamaConfig's, for what is left out."""


def read_llama(path: Path, settings: Any, *, vocab_size: int, qk_norm: QKNorm, groups: int | None) -> ModelConfig:
    """The decoder that config.json describes, with another vocabulary and a QK-norm.

    Args:
        vocab_size: of the mixed-modal vocabulary.
        groups: of heads with a QK-norm of their own; None: as many as can be, the heads of keys.

    Raises:
        ValueError: another model, or one with what this project's decoder does not have.
    """
    if not isinstance(settings, dict) or settings.get("model_type") != "llama":
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        raise ValueError(f"{path}: model_type is {kind!r}, not 'llama'")
    values = {**DEFAULTS, **{name: value for name, value in settings.items() if value is not None}}
    for name, wanted in UNSUPPORTED.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name}={values[name]!r}, and the decoder here has {wanted!r} only")
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    hidden, heads = _size(path, values, "hidden_size"), _size(path, values, "num_attention_heads")
    key_heads = _size(path, values, "num_key_value_heads")
    if (width := values.get("head_dim", hidden // heads)) != hidden / heads:
        raise ValueError(f"{path}: head_dim={width!r}, but heads of the decoder here have hidden_size / {heads}")
    model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=_size(path, values, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=key_heads,
        ffn_hidden_size=_size(path, values, "intermediate_size"),
        context_length=_size(path, values, "max_position_embeddings"),
        norm_eps=_number(path, values, "rms_norm_eps"),
        rope_theta=rope_theta(path, values),
        qk_norm=qk_norm,
        qk_norm_groups=1 if qk_norm == "none" else groups or key_heads,
    )
    try:
        model.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model


def source_rows(path: Path, settings: dict[str, Any]) -> int:
    """Rows of embedding and head in the source.

    Raises:
        ValueError: config.json does not say.
    """
    return _size(path, settings, "vocab_size")


def _size(path: Path, values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}, not a positive whole number")
    return value


def _number(path: Path, values: dict[str, Any], name: str) -> float:
    value: Any = values.get(name)
    if type(value) not in (int, float) or not 0 <= value < 1:  # JSON has whole numbers that no float holds
        raise ValueError(f"{path}: {name} is {value!r}, not a small number")
    return float(value)
