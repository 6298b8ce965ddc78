"""Matrix products of tensor-parallel linear layers, with the weight's gradient added straight to the fp32 sum.

megatron-core's layers call `_forward_impl` for their product and nothing else, so layers here inherit all the rest.
Its own version makes the weight's gradient in the weight's precision, and a hook adds it to `main_grad`; to skip the
copy it wants apex. Here any three functions serve as the products of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megachameleon.config import KernelsConfig
from megachameleon.model.main_grad import added_to_main_grad


@dataclass(frozen=True, kw_only=True)
class Products:
    """What a linear layer of weight [n, k] multiplies."""

    output: Callable[[Tensor, Tensor], Tensor]
    """(x [m, k], weight) to [m, n]."""
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output [m, n], weight) to [m, k]."""
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor], None]
    """(gradient of the output, x, fp32 sum [n, k]): adds to the sum in place."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Modules or specs for the slots of a block's matrices; constructors as megatron-core's."""

    column: Any
    """Splits its outputs over tensor ranks."""
    row: Any
    """Splits its inputs."""


def choose_linear(kernels: KernelsConfig) -> Linear:
    """Layers for a configuration without `auto`."""
    if kernels.linear == "reference":
        return Linear(column=ColumnParallelLinear, row=RowParallelLinear)
    if kernels.linear == "transformer_engine":
        from megachameleon.model.kernels import transformer_engine

        return transformer_engine.linear()
    parts = {"products": products(kernels)}
    return Linear(column=ModuleSpec(ColumnLinear, params=parts), row=ModuleSpec(RowLinear, params=parts))


def products(kernels: KernelsConfig) -> Products:
    """The three products for `linear` torch or apex, with or without `fp8` scaled_mm."""
    add_weight_gradient = _apex_weight_gradient() if kernels.linear == "apex" else add_torch_weight_gradient
    if kernels.fp8 == "scaled_mm":
        from megachameleon.model.kernels import float8

        return Products(
            output=float8.output, input_gradient=float8.input_gradient, add_weight_gradient=add_weight_gradient
        )
    return Products(
        output=lambda x, weight: x @ weight.t(),
        input_gradient=lambda grad, weight: grad @ weight,
        add_weight_gradient=add_weight_gradient,
    )


def add_torch_weight_gradient(grad: Tensor, x: Tensor, main_grad: Tensor) -> None:
    """See `Products.add_weight_gradient`."""
    add_product(main_grad, grad.t(), x)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] @ b [k, n] in place. On CUDA bf16 products are summed in fp32 without a copy between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total.add_(a @ b)  # the CPU has no product that writes another dtype
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _apex_weight_gradient() -> Callable[[Tensor, Tensor, Tensor], None]:
    import fused_weight_gradient_mlp_cuda as apex

    return lambda grad, x, main_grad: apex.wgrad_gemm_accum_fp32(x, grad, main_grad)


class _OwnProducts:
    """Takes megatron-core's single call point."""

    def __init__(self, *arguments: Any, products: Products, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.products = products

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> Tensor:
        return _LinearProduct.apply(input, weight, self.products, tp_group, sequence_parallel, allreduce_dgrad)


class ColumnLinear(_OwnProducts, ColumnParallelLinear):
    """megatron-core's layer over products of our choice."""


class RowLinear(_OwnProducts, RowParallelLinear):
    """megatron-core's layer over products of our choice."""


class _LinearProduct(torch.autograd.Function):
    """x W^T, with megatron-core's order of products and communication, so that they overlap in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, products: Products, group: Any, gather: bool, reduce: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.group, ctx.gather, ctx.reduce = products, group, gather, reduce
        # Not kept: the buffer is shared by all layers, and backward gathers again.
        whole = _gather_start(x, group)[0] if gather else x
        return products.output(whole.flatten(0, -2), weight).view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        group, wants_weight = ctx.group, ctx.needs_input_grad[1]
        whole, waiting = x, None
        if ctx.gather and wants_weight:
            # The gather runs beside the next product, which does not need it.
            whole, waiting = _gather_start(x, group, async_op=True)
        rows = grad.flatten(0, -2).contiguous()
        grad_x = ctx.products.input_gradient(rows, weight).view(*grad.shape[:-1], -1)
        if waiting is not None:
            waiting.wait()
        reduced = None
        if ctx.gather:
            total, grad_x = grad_x, torch.empty_like(x)
            # The sum over ranks runs beside the product for the weight.
            reduced = dist.reduce_scatter_tensor(grad_x, total, group=group, async_op=True)
        elif ctx.reduce:
            reduced = dist.all_reduce(grad_x, group=group, async_op=True)
        grad_weight = _weight_gradient(ctx.products, rows, whole.flatten(0, -2), weight) if wants_weight else None
        if reduced is not None:
            reduced.wait()
        return grad_x, grad_weight, None, None, None, None


def _gather_start(x: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """[s / ranks, ...] to [s, ...] in the buffer that megatron-core's layers share for it, and the work to wait for."""
    whole = get_global_memory_buffer().get_tensor([len(x) * group.size(), *x.shape[1:]], x.dtype, "mpu")
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=async_op)


def _weight_gradient(products: Products, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:  # not wrapped for training
        return grad.t() @ x
    products.add_weight_gradient(grad, x, main_grad)
    return added_to_main_grad(weight)
