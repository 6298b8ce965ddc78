"""Every operation written plainly: slow, and what the fast ones are tested against.

Shapes: S queries, T keys, B batch, N query heads, G key/value heads, D head dimension, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, computed in fp32, in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Mean-subtracting norm over the last dim with affine, computed in fp32, in the dtype of `x`."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, scale: float) -> Tensor:
    """Causal attention within documents, scores in fp32.

    Args:
        query: [S, B, N, D]; the last S of T positions.
        key: [T, B, G, D].
        value: [T, B, G, D].
        document_ids: [B, T]; a query sees keys of its own document only. None means one document.

    Returns:
        [S, B, N, D] in the dtype of `query`.
    """
    num_queries, num_keys = query.size(0), key.size(0)
    repeat = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(repeat, dim=2).float() for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query.float(), key) * scale
    scores = scores.masked_fill(~visible(num_queries, num_keys, document_ids, query.device), -math.inf)
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).to(query.dtype)


def visible(num_queries: int, num_keys: int, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query may see: [1 or B, 1, S, T], True where it may."""
    offset = num_keys - num_queries
    positions = torch.arange(num_keys, device=device)
    causal = positions[None, :] <= positions[offset:, None]
    if document_ids is None:
        return causal[None, None]
    same = document_ids[:, offset:, None] == document_ids[:, None, :]
    return (causal & same)[:, None]


def cross_entropy(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log-partition over a vocabulary that is split over `group`.

    Args:
        logits: [S, B, V / tensor_parallel].
        labels: [S, B] ids of the whole vocabulary.

    Returns:
        Two fp32 tensors [S, B].
    """
    wide = logits.float()
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
