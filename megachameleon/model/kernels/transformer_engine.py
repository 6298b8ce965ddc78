"""Operations on Transformer Engine 2.11. Written from its source; see docs/guides/gpu.md for what has never been run.

Norms stay apart from linear layers, so that parameters have the same names with every backend and Swin order works.
"""

from typing import Any

import torch
import transformer_engine_torch as tex
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention, UserBufferQuantizationMode, initialize_ub
from transformer_engine.pytorch.constants import TE_DType

from megachameleon.model.kernels import native
from megachameleon.model.kernels.linear import Linear
from megachameleon.model.sequence_layout import SequenceLayout


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See `reference.head_norm`. Where heads have their own affine, torch's: Transformer Engine has one for all."""
    if weight.dim() > 1:
        return native.head_norm(x, weight, bias, eps)
    return rms_norm(x, weight, eps) if bias is None else _LayerNorm.apply(x, weight, bias, eps)


class _RMSNorm(torch.autograd.Function):
    """As transformer_engine.pytorch.ops.RMSNorm calls its kernels, which wants to own the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.size(-1))
        output, _, scale = tex.rmsnorm_fwd(rows, weight, eps, None, None, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(rows, weight, scale)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = tex.rmsnorm_bwd(grad.contiguous().view(rows.shape), rows, scale, weight, 0, False)
        return grad_x.view(grad.shape), grad_weight, None


class _LayerNorm(torch.autograd.Function):
    """As transformer_engine.pytorch.ops.LayerNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.size(-1))
        output, mean, scale = tex.layernorm_fwd(rows, weight, bias, eps, None, None, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(rows, weight, mean, scale)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, scale = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = tex.layernorm_bwd(
            grad.contiguous().view(rows.shape), rows, mean, scale, weight, 0, False
        )
        return grad_x.view(grad.shape), grad_weight, grad_bias, None


class Attention(native.Attention):
    """Flash or cuDNN attention as Transformer Engine picks; generation, which has few queries, is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self._attend: Any = None
        """Made at the first call, which shows the heads; they are the same in every layer."""

    def plan(self, layout: SequenceLayout) -> Any:
        """Where each document begins, int32 [documents + 1] over batch x sequence; None where rows are documents.

        Counting documents waits for the device once a micro-batch.
        """
        if not layout.covers_all_keys:
            return super().plan(layout)
        return None if layout.document_ids is None else Documents(layout)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        """See `reference.Attention`."""
        if plan is not None and not isinstance(plan, Documents):
            return super().__call__(query, key, value, plan, scale)
        if self._attend is None:
            heads, head_dim = query.shape[2:]
            self._attend = DotProductAttention(heads, head_dim, num_gqa_groups=key.size(2), softmax_scale=scale)
        if plan is None:
            return self._attend(query, key, value, qkv_format="sbhd", attn_mask_type="causal").view(query.shape)
        # thd has no batch: rows stand one after the other, and documents are told by their starts alone.
        packed = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
        output = self._attend(
            *packed,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            cu_seqlens_q=plan.starts,
            cu_seqlens_kv=plan.starts,
            max_seqlen_q=plan.longest,
            max_seqlen_kv=plan.longest,
        )
        length, batch = query.shape[:2]
        return output.view(batch, length, *query.shape[2:]).transpose(0, 1)


class Documents:
    """Documents of a micro-batch, laid end to end."""

    def __init__(self, layout: SequenceLayout) -> None:
        ids = layout.document_ids
        assert ids is not None
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        self.starts = torch.cat((starts, starts.new_full((1,), begins.numel()))).int()
        self.longest = layout.num_keys
        """A bound; the true number would have to be waited for."""


class _StraightToMainGrad:
    """Adds the weight's gradient to `main_grad` where there is one; has no state beside its weight."""

    weight: torch.nn.Parameter

    def forward(self, x: Tensor) -> Any:
        """[s, b, k] to ([s, b, n], None)."""
        # At each call: `main_grad` comes after construction, with DistributedDataParallel, or not at all.
        self.fuse_wgrad_accumulation = hasattr(self.weight, "main_grad")
        return super().forward(x)  # type: ignore[misc]

    def get_extra_state(self) -> None:
        """Nothing is saved: the scales of a delayed FP8 recipe are found anew after a resume."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing was saved."""


class ColumnLinear(_StraightToMainGrad, TEColumnParallelLinear):
    """megatron-core's wrapper of Transformer Engine's Linear."""


class RowLinear(_StraightToMainGrad, TERowParallelLinear):
    """megatron-core's wrapper of Transformer Engine's Linear."""


def linear() -> Linear:
    """See `choose_linear`."""
    return Linear(column=ColumnLinear, row=RowLinear)


def start_userbuffers(num_tokens: int, hidden_size: int, tensor_parallel: int, *, fp8: bool) -> None:
    """Make the buffers over which tensor ranks communicate during products. Once, before the first step.

    Args:
        num_tokens: of a micro-batch, over all tensor ranks.
    """
    mode = UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE
    initialize_ub([num_tokens, hidden_size], tensor_parallel, quantization_modes=[mode], bootstrap_backend="nccl")
