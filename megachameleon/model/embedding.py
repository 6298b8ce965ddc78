"""Token embedding whose gradient is added, row by row, straight to the fp32 sum."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megachameleon.model.main_grad import added_to_main_grad


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding without its dense gradient.

    A micro-batch touches few rows; megatron-core fills a gradient of the whole vocabulary and adds all of it to
    `main_grad`. The order of additions is fixed here on every device, which `F.embedding` does not promise on CUDA.
    """

    @classmethod
    def instead_of(cls, plain: VocabParallelEmbedding, config: Any) -> "TokenEmbedding":
        """An embedding on the very weight of the one that megatron-core has built."""
        with torch.device("meta"):  # nothing is allocated twice
            embedding = cls(
                plain.num_embeddings,
                plain.embedding_dim,
                init_method=config.embedding_init_method,
                reduce_scatter_embeddings=plain.reduce_scatter_embeddings,
                config=config,
                tp_group=plain.tp_group,
            )
        # The same parameter, with the marks by which megatron-core knows that it is split.
        embedding.weight = plain.weight
        return embedding

    def forward(self, input_: Tensor) -> Tensor:
        """Ids [b, s] to [b, s, h], or, where embeddings are scattered along the sequence, to [s / ranks, b, h]."""
        local, elsewhere = input_, None
        if self.tp_group.size() > 1:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            # Row 0 stands in: an index must be valid, and what it reads is set to zero.
            local = (input_ - self.vocab_start_index).masked_fill_(elsewhere, 0)
        rows = _Lookup.apply(local, elsewhere, self.weight)
        if self.reduce_scatter_embeddings:
            # Parts are cut along dim 0, which must be the sequence.
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    """Rows of a weight; zeros where another tensor rank has them."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, elsewhere: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, elsewhere, weight)
        rows = F.embedding(ids, weight)
        return rows if elsewhere is None else rows.masked_fill_(elsewhere.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, elsewhere, weight = ctx.saved_tensors
        # Else all of them would be added to row 0, which stood in for them.
        if elsewhere is not None:
            grad = grad.masked_fill(elsewhere.unsqueeze(-1), 0)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:  # not wrapped for training
            total = torch.zeros_like(weight, dtype=torch.float32)
            return None, None, _add_rows(total, ids, grad).to(weight.dtype)
        _add_rows(main_grad, ids, grad)
        return None, None, added_to_main_grad(weight)


def _add_rows(total: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Add rows [b, s, h] to the rows `ids` of a sum; both operations take equal ids in a fixed order."""
    rows = grad.flatten(0, 1).to(total.dtype)
    if total.device.type == "cpu":
        return total.index_add_(0, ids.flatten(), rows)
    # On CUDA index_add_ adds atomically, in any order; this one sorts first.
    return total.index_put_((ids.flatten(),), rows, accumulate=True)
