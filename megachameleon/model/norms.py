"""RMSNorm for blocks and grouped QK-norm, legal under sequence parallelism."""

from typing import Any

import torch
from torch import Tensor, nn

from megachameleon.model.kernels.table import HeadNorm, RMSNorm


class BlockNorm(nn.Module):
    """RMSNorm over the hidden dimension.

    Its weight is marked `sequence_parallel`, so that megatron-core sums the gradient over ranks that each saw a part
    of the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, kernel: RMSNorm) -> None:
        super().__init__()
        self.eps, self.kernel = eps, kernel
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.kernel(x, self.weight, self.eps)


class GroupedHeadNorm(nn.Module):
    """QK-norm: a norm over the head dimension whose affine is shared by contiguous groups of heads.

    Chameleon 7B has one group; the released 34B has four, one for each model-parallel rank it was trained with
    (transformers' ChameleonConfig, `model_parallel_size`). Weights are 1-D [groups * head_dim] and whole on every
    tensor-parallel rank: any layout loads them, and weight decay passes over them. megatron-core sums their gradients
    over tensor ranks because the module is named `q_layernorm` or `k_layernorm`.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float,
        *,
        num_heads: int,
        num_groups: int,
        tensor_rank: int,
        kernel: HeadNorm,
        with_bias: bool,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_groups = hidden_size, num_heads, num_groups
        self.eps, self.kernel, self.tensor_rank = eps, kernel, tensor_rank
        self.weight = nn.Parameter(torch.ones(num_groups * hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_groups * hidden_size)) if with_bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads of this rank, head_dim] to the same shape."""
        x = x.contiguous()  # a view would keep queries, keys and values together until backward
        local_heads = x.size(-2)
        bias = None if self.bias is None else self._by_head(self.bias, local_heads)
        return self.kernel(x, self._by_head(self.weight, local_heads), bias, self.eps)

    def _by_head(self, affine: Tensor, local_heads: int) -> Tensor:
        """[groups * head_dim] to [head_dim] where all heads share it, else to [heads of this rank, head_dim]."""
        if self.num_groups == 1:
            return affine
        heads_in_group, first = self.num_heads // self.num_groups, self.tensor_rank * local_heads
        groups = affine.view(self.num_groups, 1, self.head_dim).expand(-1, heads_in_group, -1)
        return groups.reshape(self.num_heads, self.head_dim)[first : first + local_heads]
