"""Operations on torch's own fast kernels: any device, nothing to build."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megachameleon.model.kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return F.rms_norm(x, (x.size(-1),), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `reference.layer_norm`."""
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps)


def attention(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, scale: float) -> Tensor:
    """See `reference.attention`. On the CPU, documents are attended apart, so no S x T mask is built."""
    if document_ids is not None and query.size(0) == key.size(0) and query.device.type == "cpu":
        return _attention_by_document(query, key, value, document_ids, scale)
    mask = None
    is_causal = document_ids is None and query.size(0) == key.size(0)
    if not is_causal:
        mask = reference.visible(query.size(0), key.size(0), document_ids, query.device)
    if mask is not None and query.device.type == "cuda":
        # No fused CUDA kernel takes a mask and grouped heads at once; the fallback would hold all scores.
        key, value = (x.repeat_interleave(query.size(2) // x.size(2), dim=2) for x in (key, value))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return _sdpa(q, k, v, scale, mask=mask, is_causal=is_causal).permute(2, 0, 1, 3)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    dtype, grouped = q.dtype, q.size(1) != k.size(1)
    if q.device.type == "cpu":  # its bf16 backward takes 1.2 (448 tokens) to 4 times (76 tokens) as long as fp32's
        q, k, v = q.float(), k.float(), v.float()
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return output.to(dtype)


def _attention_by_document(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor, scale: float) -> Tensor:
    """Gather documents of similar length into padded batches and attend in each causally.

    Padding stands at the end of a document, where causality hides it from every real token.
    """
    seq, batch, heads, dim = query.shape
    starts, lengths = _documents(document_ids)
    flat = [x.transpose(0, 1).reshape(batch * seq, x.size(2), dim) for x in (query, key, value)]
    outputs, places = [], []
    buckets = torch.ceil(torch.log2(lengths.float())).long()
    for bucket in buckets.unique():
        chosen = buckets == bucket
        first, length = starts[chosen, None], lengths[chosen, None]
        offset = torch.arange(int(length.max()))
        real = offset < length
        index = torch.where(real, first + offset, first)
        q, k, v = (x[index].transpose(1, 2) for x in flat)
        outputs.append(_sdpa(q, k, v, scale, mask=None, is_causal=True).transpose(1, 2)[real])
        places.append(index[real])
    order = torch.empty(batch * seq, dtype=torch.long)
    order[torch.cat(places)] = torch.arange(batch * seq)
    return torch.cat(outputs)[order].view(batch, seq, heads, dim).transpose(0, 1)


def _documents(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and lengths of the runs of equal ids in [B, S], flattened row by row."""
    change = torch.ones_like(document_ids, dtype=torch.bool)
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = change.flatten().nonzero().squeeze(-1)
    ends = torch.cat((starts[1:], starts.new_tensor([document_ids.numel()])))
    return starts, ends - starts


def cross_entropy(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """See `reference.cross_entropy`. Keeps one softmax, which serves both gradients."""
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    """d(nll)/dz = p - onehot(label) and d(log Z)/dz = p, so one stored softmax serves both."""

    @staticmethod
    def forward(ctx, logits, labels, group):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        wide = logits.float()
        largest = wide.amax(-1)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        width = wide.size(-1)
        local = labels - group.rank() * width
        elsewhere = (local < 0) | (local >= width)
        local = local.masked_fill(elsewhere, 0)
        predicted = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest
        exponentials = (wide - largest.unsqueeze(-1)).exp_()
        sums = torch.stack((predicted.masked_fill_(elsewhere, 0.0), exponentials.sum(-1)))
        torch.distributed.all_reduce(sums, group=group)
        predicted, total = sums.unbind(0)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits.dtype
        log_total = total.log()
        return log_total - predicted, log_total + largest

    @staticmethod
    def backward(ctx, grad_nll, grad_log_z):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        softmax, local, elsewhere = ctx.saved_tensors
        grad = softmax * (grad_nll + grad_log_z).unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), -grad_nll.masked_fill(elsewhere, 0.0).unsqueeze(-1))
        return grad.to(ctx.dtype), None, None
