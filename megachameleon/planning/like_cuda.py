"""What the CPU does in other steps than CUDA, put right while memory is counted on fake CPU tensors.

On CUDA norms are one kernel each way, products are added to fp32 sums in place, dropout keeps a byte for each element,
and the head works in other blocks and gives its memory back. Stand-ins with the same inputs, outputs and tensors kept
for backward compute nothing: fake tensors have no contents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from megachameleon.config import RunConfig
from megachameleon.model.kernels import chunked_head, linear
from megachameleon.model.kernels.chunked_head import GPU_SIZES, BlockSizes, ChunkedHead
from megachameleon.model.kernels.table import Kernels


def kernels_like_cuda(kernels: Kernels, config: RunConfig) -> Kernels:
    """Kernels of `torch` that allocate as on CUDA; the plain ones are the same on both."""
    chosen = kernels.resolved
    changes: dict[str, Any] = {}
    if chosen.norm == "torch":
        changes["rms_norm"] = lambda x, weight, eps: _OneKernelNorm.apply(x, weight, None)
    if chosen.qk_norm == "torch":
        changes["head_norm"] = lambda x, weight, bias, eps: _OneKernelNorm.apply(x, weight, bias)
    if chosen.loss == "torch":
        # CUDA holds logits of a chunk and their gradient; here an fp32 copy of a block stands for the latter.
        rows = config.model.vocab_size // config.parallel.tensor_parallel
        block = rows if config.training.precision == "fp32" else max(rows // 2, 1)
        blocks = BlockSizes(tokens=GPU_SIZES.tokens, vocabulary=block)
        changes["head_loss"] = _PassingHead(blocks)
    return replace(kernels, **changes)


@contextmanager
def operations_like_cuda() -> Iterator[None]:
    """Within it, sums of products and dropout allocate as on CUDA."""

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        assert total.shape == (len(a), b.size(1))
        # In place: on CUDA the product is added without a tensor between.
        total.add_(0)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # It keeps a mask of bytes, as CUDA does; on the CPU F.dropout keeps one of the dtype of x.
        return torch.native_dropout(x, p, training)[0] if training and p > 0 else x

    with (
        patch.object(linear, "add_product", add_product),
        patch.object(chunked_head, "add_product", add_product),
        patch.object(F, "dropout", dropout),
    ):
        yield


class _PassingHead(ChunkedHead):
    """Gives its working memory back."""

    def memory(self, name: str, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised [numel]."""
        return like.new_empty(numel, dtype=dtype)


class _OneKernelNorm(torch.autograd.Function):
    """A norm over the last dim that keeps its input and the statistics of each row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        statistics = x.new_empty(*x.shape[:-1], 1 if bias is None else 2, dtype=torch.float32)
        ctx.save_for_backward(x, weight, statistics)
        ctx.has_bias = bias is not None
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None
