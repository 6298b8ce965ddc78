"""Where plain tensors stand in the global tensors of our own checkpoints, whose names are megatron-core's.

Layers are stacked on a first axis. Queries of a query group, its key and its value stand together in `linear_qkv`, gate
and up one after the other in `linear_fc1`; the norms of a block have other names where they stand behind it (Swin).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megachameleon.checkpoint.boxes import Box, Shape
from megachameleon.checkpoint.formats.plain import layer_of
from megachameleon.config import ModelConfig

TOP = {
    "embedding": "embedding.word_embeddings.weight",
    "final_norm": "decoder.final_layernorm.weight",
    "head": "output_layer.weight",
}
BEFORE = {"attention_norm": "input_layernorm.weight", "ffn_norm": "pre_mlp_layernorm.weight"}
BEHIND = {"attention_norm": "self_attn_bda.norm.weight", "ffn_norm": "mlp_bda.norm.weight"}
IN_A_LAYER = {
    "q": "self_attention.linear_qkv.weight",
    "k": "self_attention.linear_qkv.weight",
    "v": "self_attention.linear_qkv.weight",
    "o": "self_attention.linear_proj.weight",
    "gate": "mlp.linear_fc1.weight",
    "up": "mlp.linear_fc1.weight",
    "down": "mlp.linear_fc2.weight",
    "q_norm.weight": "self_attention.q_layernorm.weight",
    "q_norm.bias": "self_attention.q_layernorm.bias",
    "k_norm.weight": "self_attention.k_layernorm.weight",
    "k_norm.bias": "self_attention.k_layernorm.bias",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A box of a plain tensor, and where its first value stands in the global tensor, which may have other axes."""

    plain: Box
    offset: Shape


def global_key(model: ModelConfig, name: str) -> str:
    """The name of the global tensor that holds a plain one."""
    layer, rest = layer_of(name)
    if layer is None:
        return TOP[name]
    norms = BEHIND if model.norm_order == "swin" else BEFORE
    return f"decoder.layers.{norms.get(rest) or IN_A_LAYER[rest]}"


def global_shapes(model: ModelConfig, plain: dict[str, Shape]) -> dict[str, Shape]:
    """Shapes of all global tensors by their names, from those of the plain ones."""
    shapes: dict[str, Shape] = {}
    for name, shape in plain.items():
        layer, rest = layer_of(name)
        key = global_key(model, name)
        if layer is None:
            shapes[key] = shape
        elif rest in ("q", "k", "v"):
            rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
            shapes[key] = (model.num_layers, rows, model.hidden_size)
        elif rest in ("gate", "up"):
            shapes[key] = (model.num_layers, 2 * shape[0], shape[1])
        elif "_norm." in rest:
            shapes[key] = (model.num_layers, shape[0] * shape[1])
        else:
            shapes[key] = (model.num_layers, *shape)
    return shapes


def places(model: ModelConfig, name: str, shape: Shape) -> Iterator[Place]:
    """The boxes of a plain tensor that stand together in the global one; all of it, in order."""
    layer, rest = layer_of(name)
    origin = (0,) * len(shape)
    if layer is None:
        yield Place(plain=Box(origin, shape), offset=origin)
    elif rest in ("q", "k", "v"):
        width, queries = model.head_dim, model.num_attention_heads // model.num_query_groups
        rows, skip = {"q": (queries, 0), "k": (1, queries), "v": (1, queries + 1)}[rest]
        for group in range(model.num_query_groups):
            box = Box((group * rows * width, 0), (rows * width, shape[1]))
            yield Place(plain=box, offset=(layer, (group * (queries + 2) + skip) * width, 0))
    elif "_norm." in rest:  # of queries and keys: the vectors of all groups end to end
        for group in range(shape[0]):
            yield Place(plain=Box((group, 0), (1, shape[1])), offset=(layer, group * shape[1]))
    else:
        below = shape[0] if rest == "up" else 0
        yield Place(plain=Box(origin, shape), offset=(layer, below, *origin[1:]))
