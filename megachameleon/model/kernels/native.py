"""Operations on torch's own fast kernels: any device, nothing to build."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megachameleon.model.kernels import reference
from megachameleon.model.kernels.segmented_attention import Segments, plan_segments, segmented_attention
from megachameleon.model.sequence_layout import SequenceLayout

IN_ORDER_OF_SPEED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On Hopper; the first that can run does. The last holds all scores: only fp32 with grouped heads needs it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if weight.dim() == 1 and x.device.type == "cuda":
        return F.rms_norm(x, (x.size(-1),), weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # torch's own decomposes on the CPU and keeps fp32 copies


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        product = grad * normed
        grad_weight = product.sum_to_size(weight.shape).to(weight.dtype)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def head_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See `reference.head_norm`."""
    if bias is None:
        return rms_norm(x, weight, eps)
    if weight.dim() == 1 and x.device.type == "cuda":
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over the last dim with an affine that is shared, or one for each head; keeps its input only.

    Gradients of the affine are summed in fp32: torch's own bf16 sums on the CPU are off by 9 % after 8,192 rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        shared = weight.dim() == 1
        # torch's kernel takes one affine for all rows, not one for each head.
        output, mean, scale = torch.native_layer_norm(
            x, (x.size(-1),), weight if shared else None, bias if shared else None, eps
        )
        ctx.save_for_backward(x, weight, mean, scale)
        return output if shared else output.mul_(weight).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        # With the affine in the gradient already, the kernel sees a plain norm and sums nothing in bf16.
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * weight, x, (x.size(-1),), mean, scale, None, None, (True, False, False)
        )
        wide = grad.float()
        grad_bias = wide.sum_to_size(weight.shape)
        grad_weight = (x.float() - mean).mul_(scale).mul_(wide).sum_to_size(weight.shape)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`."""
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.chunk(2, -1), output.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return output


def swiglu(x: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only; autograd would keep silu of the gate as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        output = torch.empty_like(x)
        grad_gate, grad_up = output.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return output


class Attention:
    """SDPA where there are no documents; on the CPU document by document, on CUDA FlexAttention with a block mask."""

    def __init__(self) -> None:
        self._flex: Callable[..., Tensor] | None = None

    def plan(self, layout: SequenceLayout) -> "Segments | Tensor | Any | None":
        """What tells queries their keys: nothing (causal), segments (CPU), a block mask, or a dense mask in generation,
        whose many lengths would each be compiled."""
        if layout.device.type == "cpu":
            # With cached keys, queries are a few at the end: pieces are planned for whole sequences only.
            whole = layout.covers_all_keys or not layout.for_generation
            return plan_segments(layout) if whole else reference.visible(layout)
        if layout.covers_all_keys and layout.document_ids is None:
            return None
        return reference.visible(layout) if layout.for_generation else _block_mask(layout)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        """See `reference.Attention`."""
        if isinstance(plan, Segments):
            return segmented_attention(query, key, value, plan, scale)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.size(2) != key.size(2)
        if plan is None or isinstance(plan, Tensor):
            output = _sdpa(q, k, v, scale, mask=plan, grouped=grouped)
        else:
            output = self._compiled_flex()(q, k, v, block_mask=plan, scale=scale, enable_gqa=grouped)
        return output.permute(2, 0, 1, 3)

    def _compiled_flex(self) -> Callable[..., Tensor]:
        if self._flex is None:
            from torch.nn.attention.flex_attention import flex_attention

            self._flex = torch.compile(flex_attention)  # uncompiled it holds all scores
        return self._flex


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None, grouped: bool) -> Tensor:
    if q.device.type == "cuda" and mask is not None and grouped:
        # No fused CUDA kernel takes a mask and grouped heads at once.
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        grouped = False
    if q.device.type == "cpu" or mask is not None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    with sdpa_kernel(IN_ORDER_OF_SPEED, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def _block_mask(layout: SequenceLayout) -> Any:
    """FlexAttention's mask by blocks. On the way torch makes a dense one, a byte for each query and key of a row."""
    from torch.nn.attention.flex_attention import create_block_mask

    queries, ids = layout.query_positions(), layout.document_ids

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= queries[query]

    def causal_in_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert ids is not None
        return (key <= queries[query]) & (ids[batch, queries[query]] == ids[batch, key])

    return create_block_mask(
        causal if ids is None else causal_in_document,
        # None: one mask for all rows, or for all heads.
        None if ids is None else layout.batch,
        None,
        len(queries),
        layout.num_keys,
        device=layout.device,
    )
