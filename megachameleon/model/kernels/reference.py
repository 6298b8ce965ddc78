"""Every operation written plainly: slow, and what the fast ones are tested against.

Shapes: S queries, T keys, B batch, N query heads, G key/value heads, D head dimension, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from megachameleon.model.head import Targets, loss_sums
from megachameleon.model.sequence_layout import SequenceLayout


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., D] over the last dim, computed in fp32, in the dtype of `x`. `weight`: [D]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """QK-norm: like `layer_norm`, or `rms_norm` without a bias, with an affine for each head.

    Args:
        x: [..., N, D].
        weight: [D] for all heads, or [N, D].
        bias: like `weight`.
    """
    wide = x.float()
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864), pairing dims i and i + D / 2.

    Args:
        x: [S, B, N, D].
        cos: [S, B or 1, 1, D / 2].
        sin: like `cos`.
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] to [..., F]: silu of the first half times the second (arXiv 2002.05202)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Attention:
    """Causal attention within documents, scores in fp32, under a dense mask."""

    def plan(self, layout: SequenceLayout) -> Tensor:
        """Which keys each query may see: bool [1 or B, 1, S, T], True where it may. Made once for all layers."""
        return visible(layout)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, D].
            key: [T, B, G, D].
            value: [T, B, G, D].

        Returns:
            [S, B, N, D] in the dtype of `query`.
        """
        repeat = query.size(2) // key.size(2)
        key, value = (x.repeat_interleave(repeat, dim=2).float() for x in (key, value))
        scores = torch.einsum("sbnd,tbnd->bnst", query.float(), key) * scale
        weights = scores.masked_fill(~plan, -math.inf).softmax(-1)
        return torch.einsum("bnst,tbnd->sbnd", weights, value).to(query.dtype)


def visible(layout: SequenceLayout) -> Tensor:
    """The dense mask of `Attention.plan`: bool [1 or B, 1, S, T], True where a query may see a key."""
    queries = layout.query_positions()
    causal = torch.arange(layout.num_keys, device=layout.device)[None, :] <= queries[:, None]
    if layout.document_ids is None:
        return causal[None, None]
    ids = layout.document_ids
    return (causal & (ids[:, queries, None] == ids[:, None, :]))[:, None]


def _cross_entropy(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log-partition over a vocabulary that is split over `group`.

    Args:
        logits: [n, V / tensor_parallel].
        labels: [n] ids of the whole vocabulary.

    Returns:
        Two fp32 tensors [n].
    """
    wide = logits.float()
    # Without a gradient: the maximum cancels out of the loss.
    largest = wide.detach().amax(-1)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted = wide - largest.unsqueeze(-1)
    width = wide.size(-1)
    local = labels - group.rank() * width
    mine = (local >= 0) & (local < width)
    target = F.one_hot(local.clamp(0, width - 1), width).to(wide.dtype) * mine.unsqueeze(-1)
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1), group)
    predicted = reduce_from_tensor_model_parallel_region((shifted * target).sum(-1), group)
    return total.log() - predicted, total.log() + largest


def head_loss(hidden: Tensor, weight: Tensor, targets: Targets, group: Any, sequence_parallel: bool) -> Tensor:
    """Linear head, cross entropy and z-loss over a vocabulary that is split over `group`.

    Args:
        hidden: [s, b, h]; with `sequence_parallel`, this rank's part of the sequence, [s / tensor_parallel, b, h].
        weight: [vocab / tensor_parallel, h], rows of this rank's ids.
        targets: of the whole sequence.

    Returns:
        The fp64 sums of `loss_sums`, the same on every rank of `group`. Only element 0 has a gradient.
    """
    split = group.size() > 1
    logits = linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        # Under sequence parallelism a reduce-scatter does this sum.
        allreduce_dgrad=split and not sequence_parallel,
        sequence_parallel=split and sequence_parallel,
        tp_group=group,
    )
    labels, _, _ = targets.by_token()
    return loss_sums(*_cross_entropy(logits.flatten(0, 1), labels, group), targets)
