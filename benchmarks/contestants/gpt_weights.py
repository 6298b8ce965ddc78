"""The common weights in the layout of megatron-core's GPTModel: query groups interleaved, gate above up."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.same_weights import Weights


@torch.no_grad()
def load_gpt(model: Any, weights: Weights, *, qk_bias: bool) -> None:
    """Fill a GPTModel that holds all layers.

    Args:
        qk_bias: whether its QK-norms have biases.
    """
    model.embedding.word_embeddings.weight.copy_(weights["embedding"])
    model.output_layer.weight.copy_(weights["head"])
    model.decoder.final_layernorm.weight.copy_(weights["norm"])
    for i, layer in enumerate(model.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        layer.input_layernorm.weight.copy_(weights[f"{i}.attention_norm"])
        attention.linear_qkv.weight.copy_(_interleaved(weights, i))
        attention.linear_proj.weight.copy_(weights[f"{i}.o"])
        attention.q_layernorm.weight.copy_(weights[f"{i}.q_norm"])
        attention.k_layernorm.weight.copy_(weights[f"{i}.k_norm"])
        if qk_bias:
            attention.q_layernorm.bias.copy_(weights[f"{i}.q_norm_bias"])
            attention.k_layernorm.bias.copy_(weights[f"{i}.k_norm_bias"])
        layer.pre_mlp_layernorm.weight.copy_(weights[f"{i}.mlp_norm"])
        mlp.linear_fc1.weight.copy_(torch.cat((weights[f"{i}.gate"], weights[f"{i}.up"])))
        mlp.linear_fc2.weight.copy_(weights[f"{i}.down"])


def _interleaved(weights: Weights, layer: int) -> Tensor:
    """For each query group its queries, its key and its value."""
    groups = weights.shape.kv_groups
    parts = [weights[f"{layer}.{name}"].view(groups, -1, weights.shape.hidden) for name in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)
