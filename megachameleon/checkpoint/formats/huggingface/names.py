"""Hugging Face's names and settings for Chameleon (transformers' `ChameleonForConditionalGeneration`)."""

from typing import Any

from megachameleon.checkpoint.boxes import Shape
from megachameleon.checkpoint.formats.plain import layer_of
from megachameleon.config import ModelConfig
from megachameleon.tokens.text.piece_names import IMAGE_PLACEHOLDER, image_placeholder, special_names
from megachameleon.tokens.vocabulary import Vocabulary

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICTURES = "model.vqmodel."
IGNORED = ("rotary_emb.inv_freq",)
"""Endings of what old releases have stored and every release computes."""
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""All that text goes through before the model, `tokenizer.json` first."""
CODE_PREFIX = "IMGIMG"
"""Whatever `vocabulary_map` names so, transformers takes for a picture code."""
QK_NORM_EPS = 1e-5
"""transformers' ChameleonLayerNorm has it fixed."""

TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
IN_A_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def name_in_huggingface(name: str) -> str:
    """The name of a plain tensor."""
    layer, rest = layer_of(name)
    return TOP[name] if layer is None else f"model.layers.{layer}.{IN_A_LAYER.get(rest, f'self_attn.{rest}')}"


def num_heads(model: ModelConfig, name: str) -> int:
    """The rows of a QK-norm's tensor, one for each head."""
    return model.num_attention_heads if ".q_norm." in name else model.num_query_groups


def shape_in_huggingface(model: ModelConfig, name: str, shape: Shape) -> Shape:
    """The shape of a plain tensor as transformers has it."""
    return (num_heads(model, name), shape[1]) if "_norm." in name else shape


def vocabulary_map(vocabulary: Vocabulary, pieces: dict[str, int] | None) -> dict[str, int]:
    """Name to id, as transformers looks for picture codes and `<image>` in it.

    Args:
        pieces: the vocabulary of the exported tokenizer; None: the names of control ids and codes alone.
    """
    names = dict(pieces) if pieces else {name: i for i, name in enumerate(special_names(vocabulary))}
    placeholder = image_placeholder(vocabulary)
    kept = {
        name: i
        for name, i in names.items()
        if name != IMAGE_PLACEHOLDER
        and i != placeholder
        and (i < vocabulary.text_start or not name.startswith(CODE_PREFIX))
    }
    return {**kept, IMAGE_PLACEHOLDER: placeholder}


def model_settings(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The part of config.json that says what the decoder is."""
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,  # where releases before 5.0 look
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": model.init_std,
        "model_parallel_size": model.qk_norm_groups,
        "swin_norm": model.norm_order == "swin",
        "bos_token_id": vocabulary.bos,  # transformers' own default is 1, which is the padding
        "pad_token_id": vocabulary.pad,
        "eos_token_id": vocabulary.eos,
    }
