"""Blocks as megatron-core specs: pre-norm or Swin order, grouped QK-norm, document attention."""

from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megachameleon.config import ModelConfig
from megachameleon.model.attention import DocumentAttention
from megachameleon.model.kernels.table import Kernels, RMSNorm, SwiGLU
from megachameleon.model.norms import BlockNorm, GroupedHeadNorm


class SwiGLUMLP(MLP):
    """megatron-core's MLP with a SwiGLU kernel of ours between its two linears."""

    def __init__(self, *arguments: Any, kernel: SwiGLU, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kernel = kernel

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] to the same, and no bias."""
        wide, _ = self.linear_fc1(hidden_states)  # no bias: add_bias_linear is off
        return self.linear_fc2(self.kernel(wide))


class NormThenAdd(nn.Module):
    """Swin order: residual + dropout(norm(branch)), in the slot of megatron-core's bias-dropout-add."""

    def __init__(self, config: Any, hidden_size: int, eps: float, kernel: RMSNorm) -> None:
        super().__init__()
        self.norm = BlockNorm(config, hidden_size, eps, kernel)

    def forward(self, training: bool, fused: bool) -> Any:
        """Return the function that megatron-core calls with (branch, bias), residual and dropout probability."""

        def add(branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            branch, bias = branch_and_bias
            normed = self.norm(branch if bias is None else branch + bias)
            return residual + F.dropout(normed, p=probability, training=training)

        return add


def block_spec(
    model: ModelConfig, transformer_config: Any, kernels: Kernels, tensor_rank: int, vp_stage: int | None = None
) -> Any:
    """Spec of the blocks of this pipeline stage, or of one chunk of it, with the final norm."""
    layer = layer_spec(model, transformer_config, kernels, tensor_rank)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(transformer_config, vp_stage=vp_stage),
        # A bare list of layers would get a final norm of megatron-core's choice.
        layer_norm=ModuleSpec(BlockNorm, params={"kernel": kernels.rms_norm}),
    )


def layer_spec(model: ModelConfig, transformer_config: Any, kernels: Kernels, tensor_rank: int) -> ModuleSpec:
    """Spec of one block. Parameter names differ between the two orders; shapes and counts do not."""
    norm = ModuleSpec(BlockNorm, params={"kernel": kernels.rms_norm})
    swin = model.norm_order == "swin"
    norm_then_add = ModuleSpec(
        NormThenAdd,
        params={
            "config": transformer_config,
            "hidden_size": model.hidden_size,
            "eps": model.norm_eps,
            "kernel": kernels.rms_norm,
        },
    )
    add = norm_then_add if swin else get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if swin else norm,
            self_attention=_attention_spec(model, kernels, tensor_rank),
            self_attn_bda=add,
            pre_mlp_layernorm=IdentityOp if swin else norm,
            mlp=ModuleSpec(
                SwiGLUMLP,
                params={"kernel": kernels.swiglu, "ffn_hidden_size": model.ffn_hidden_size},
                submodules=MLPSubmodules(linear_fc1=kernels.linear.column, linear_fc2=kernels.linear.row),
            ),
            mlp_bda=add,
        ),
    )


def _attention_spec(model: ModelConfig, kernels: Kernels, tensor_rank: int) -> ModuleSpec:
    def head_norm(num_heads: int) -> ModuleSpec | None:
        if model.qk_norm == "none":
            return None
        with_bias = model.qk_norm == "layernorm"
        return ModuleSpec(
            GroupedHeadNorm,
            params={
                "num_heads": num_heads,
                "num_groups": model.qk_norm_groups,
                "tensor_rank": tensor_rank,
                "kernel": kernels.head_norm,
                "with_bias": with_bias,
            },
        )

    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=kernels.linear.column,
            core_attention=ModuleSpec(DocumentAttention, params={"kernels": kernels}),
            linear_proj=kernels.linear.row,
            # By the names of these two slots megatron-core sums their gradients over tensor ranks.
            q_layernorm=head_norm(model.num_attention_heads),
            k_layernorm=head_norm(model.num_query_groups),
        ),
    )
