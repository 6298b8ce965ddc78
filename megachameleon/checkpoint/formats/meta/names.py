"""Meta's release format: names, and how a tensor is divided among the files.

A folder has one file `consolidated.pth`, or a file `consolidated.NN.pth` for each of N shards, which are those of
Meta's model parallelism: each holds a part of every matrix, all of every norm, and the QK-norm of its own heads.
"""

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape
from megachameleon.checkpoint.formats.plain import layer_of
from megachameleon.config import ModelConfig

PARAMS_FILE = "params.json"
CONSOLIDATE_FILE = "consolidate_params.json"
CHECKLIST_FILE = "checklist.chk"
SINGLE_FILE = "consolidated.pth"
ROPE = "rope.freqs"
"""A buffer that every release computes and none reads; Meta's loader insists on it."""
QK_NORM_EPS = 1e-5
"""Meta's QK-norm has torch's default, whatever norm_eps is."""

TOP = {"embedding": "tok_embeddings.weight", "final_norm": "norm.weight", "head": "output.weight"}
IN_A_LAYER = {
    "attention_norm": "attention_norm.weight",
    "q": "attention.wq.weight",
    "k": "attention.wk.weight",
    "v": "attention.wv.weight",
    "o": "attention.wo.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "feed_forward.w1.weight",
    "up": "feed_forward.w3.weight",
    "down": "feed_forward.w2.weight",
    "q_norm.weight": "attention.q_normalization.weight",
    "q_norm.bias": "attention.q_normalization.bias",
    "k_norm.weight": "attention.k_normalization.weight",
    "k_norm.bias": "attention.k_normalization.bias",
}
AXES = {"embedding": 1, "head": 0, "q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
"""Along which a matrix is divided; all others are in every file."""


def file_names(shards: int) -> list[str]:
    """Of all files, in the order of their parts."""
    return [SINGLE_FILE] if shards == 1 else [f"consolidated.{shard:02}.pth" for shard in range(shards)]


def name_in_meta(name: str) -> str:
    """The name of a plain tensor."""
    layer, rest = layer_of(name)
    return TOP[name] if layer is None else f"layers.{layer}.{IN_A_LAYER[rest]}"


def is_qk_norm(name: str) -> bool:
    """Whether a plain tensor has a vector for each group of heads."""
    return "_norm." in name


def part_of_shard(name: str, shape: Shape, shard: int, shards: int) -> Box:
    """The box of a plain tensor that a file holds; of a QK-norm, one vector."""
    # Files hold one vector each, the one of their own heads.
    axis = 0 if is_qk_norm(name) else AXES.get(layer_of(name)[1])
    part = tuple(n // shards if i == axis else n for i, n in enumerate(shape))
    return Box(tuple(shard * n if i == axis else 0 for i, n in enumerate(part)), part)


def shape_in_meta(name: str, shape: Shape, shards: int) -> Shape:
    """The shape of a plain tensor in each file; of a QK-norm, [head_dim]."""
    return shape[1:] if is_qk_norm(name) else part_of_shard(name, shape, 0, shards).shape


def require_shards(model: ModelConfig, shards: int, what: str) -> None:
    """Refuse a number of files that does not divide the model.

    Raises:
        ValueError: names all that it does not divide; begins with `what`.
    """
    sizes = {
        "heads": model.num_attention_heads,
        "key/value heads": model.num_query_groups,
        "FFN width": model.ffn_hidden_size,
        "vocabulary": model.vocab_size,
        "hidden size": model.hidden_size,
    }
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % shards]
    if wrong:
        works = [n for n in range(1, model.num_query_groups + 1) if not any(size % n for size in sizes.values())]
        raise ValueError(f"{what}: {shards} files do not divide {', '.join(wrong)}; {', '.join(map(str, works))} would")


def halves_together(rows: Tensor, width: int) -> Tensor:
    """Rows [heads x width, ...] in Meta's order, rotated pairs being neighbours, into that of rotated halves."""
    heads = rows.unflatten(0, (-1, width // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def pairs_together(rows: Tensor, width: int) -> Tensor:
    """The inverse of `halves_together`."""
    heads = rows.unflatten(0, (-1, 2, width // 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def rope_frequencies(model: ModelConfig) -> Tensor:
    """What stands in `rope.freqs`: theta^(-2i / head_dim), fp32 [head_dim / 2]."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    return (model.rope_theta**-exponents).float()
