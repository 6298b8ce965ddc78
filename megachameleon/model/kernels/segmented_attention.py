"""Attention on the CPU: documents are attended apart, so that no S x T mask is ever built.

Each row of a micro-batch is cut where a document or a chunk of queries begins or ends. The pieces attend to themselves
causally, those of similar length together. A chunk that begins inside a document (context parallelism) also attends to
the part of that document before the chunk; the two are merged by their log-sum-exp, as in online softmax. Backward
calls the flash kernel with the merged log-sum-exp, which makes each part's gradient exact.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megachameleon.model.sequence_layout import SequenceLayout

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
SHORT = 256
"""Below this length torch 2.13's bf16 flash backward is slower on the CPU than fp32's; see docs/decisions.md."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Pieces of similar length. Indices are into positions x batch, flattened; short pieces repeat their first row."""

    queries: Tensor
    """[pieces, length]."""
    keys: Tensor
    """[pieces, length]."""
    real: Tensor | None
    """bool [pieces, length]; None where all pieces have the same length."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Queries at the start of a chunk and the earlier keys of the same document."""

    queries: Tensor
    """[1, length]."""
    keys: Tensor
    """[1, length of keys]."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The plan: every query is in one bucket, and in at most one prefix."""

    buckets: list[Bucket]
    """Each query with the keys of its own piece, causally."""
    prefixes: list[Prefix]
    """Queries of pieces that go on with a document, with its earlier keys; empty without context parallelism."""


def plan_segments(layout: SequenceLayout) -> Segments:
    """Cut a micro-batch into pieces."""
    cuts = torch.zeros(layout.batch, layout.num_keys, dtype=torch.bool)
    begins = cuts.clone()
    begins[:, 0] = True
    if layout.document_ids is not None:
        begins[:, 1:] = layout.document_ids[:, 1:] != layout.document_ids[:, :-1]
    cuts |= begins
    local = torch.full((layout.num_keys,), -1)
    place = 0
    for first, count in layout.query_chunks:
        cuts[:, first] = True
        # A slice, because the end may lie behind the last key.
        cuts[:, first + count : first + count + 1] = True
        local[first : first + count] = torch.arange(place, place + count)
        place += count
    row, start = cuts.nonzero(as_tuple=True)
    flat = row * layout.num_keys + start
    # Over the rows laid end to end: each begins with a cut, so no piece reaches into the next row.
    length = torch.diff(flat, append=torch.tensor([cuts.numel()]))
    mine = local[start] >= 0
    row, start, length = row[mine], start[mine], length[mine]
    return Segments(
        buckets=_buckets(row, start, length, local, layout.batch),
        prefixes=_prefixes(row, start, length, begins, local, layout.batch),
    )


def _buckets(row: Tensor, start: Tensor, length: Tensor, local: Tensor, batch: int) -> list[Bucket]:
    # Powers of two: filling up at most doubles a piece, and there are few buckets.
    size = torch.ceil(torch.log2(length.float())).long()
    buckets = []
    for value in size.unique():
        chosen = size == value
        rows, first, lengths = row[chosen, None], start[chosen, None], length[chosen, None]
        offset = torch.arange(int(lengths.max()))
        real = offset < lengths
        # Rows that fill up stand at the end of a piece, where causality hides them from the real ones.
        position = torch.where(real, first + offset, first)
        buckets.append(
            Bucket(
                queries=local[position] * batch + rows,
                keys=position * batch + rows,
                real=None if bool(real.all()) else real,
            )
        )
    return buckets


def _prefixes(row: Tensor, start: Tensor, length: Tensor, begins: Tensor, local: Tensor, batch: int) -> list[Prefix]:
    prefixes = []
    continued = ~begins[row, start]
    for r, s, n in zip(*(x[continued].tolist() for x in (row, start, length)), strict=True):
        document = int(begins[r, :s].nonzero()[-1])
        prefixes.append(
            Prefix(
                queries=(local[s : s + n] * batch + r)[None],
                keys=(torch.arange(document, s) * batch + r)[None],
            )
        )
    return prefixes


def segmented_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """[S, B, N, D], [T, B, G, D], [T, B, G, D] to [S, B, N, D]; see `reference.Attention`."""
    return _SegmentedAttention.apply(query, key, value, segments, scale)


class _SegmentedAttention(torch.autograd.Function):
    """Keeps queries, keys, values and output in their own dtype, and one log-sum-exp for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        output = torch.empty_like(q)
        log_sum = q.new_empty(q.shape[:2], dtype=torch.float32)
        for bucket in segments.buckets:
            out, lse = _flash(q, k, v, bucket.queries, bucket.keys, scale, causal=True)
            _put(output, bucket, out)
            _put(log_sum, bucket, lse)
        for prefix in segments.prefixes:
            out, lse = _flash(q, k, v, prefix.queries, prefix.keys, scale, causal=False)
            _merge(output, log_sum, prefix.queries[0], out[0], lse[0])
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.segments, ctx.scale = segments, scale
        return output.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        segments, scale = ctx.segments, ctx.scale
        q, k, v, grad = (x.flatten(0, 1) for x in (query, key, value, grad_output))
        dtype = torch.float32 if segments.prefixes else q.dtype  # sums over parts are taken in fp32
        # Every query is in one bucket, but keys of other ranks' chunks may be in no piece at all.
        grads = [torch.empty_like(q, dtype=dtype), *(torch.zeros_like(x, dtype=dtype) for x in (k, v))]
        saved = (q, k, v, output, log_sum, grad)
        for bucket in segments.buckets:
            parts = _flash_backward(saved, bucket.queries, bucket.keys, scale, real=bucket.real, causal=True)
            for whole, index, part in zip(grads, (bucket.queries, bucket.keys, bucket.keys), parts, strict=True):
                _put_rows(whole, index, bucket.real, part)
        for prefix in segments.prefixes:
            parts = _flash_backward(saved, prefix.queries, prefix.keys, scale, real=None, causal=False)
            for whole, index, part in zip(grads, (prefix.queries, prefix.keys, prefix.keys), parts, strict=True):
                whole.index_add_(0, index[0], part[0].to(dtype))
        shapes = (query, key, value)
        dq, dk, dv = (whole.to(x.dtype).view(x.shape) for whole, x in zip(grads, shapes, strict=True))
        return dq, dk, dv, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [pieces, length, N, D] and log-sum-exp [pieces, length, N] of some rows."""
    dtype = _compute_dtype(q.dtype, keys.size(1))
    parts = (_take(x, index, dtype) for x, index in ((q, queries), (k, keys), (v, keys)))
    out, lse = FLASH(*(x.transpose(1, 2) for x in parts), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(
    saved: tuple[Tensor, ...], queries: Tensor, keys: Tensor, scale: float, *, real: Tensor | None, causal: bool
) -> list[Tensor]:
    q, k, v, output, log_sum, grad = saved
    dtype = _compute_dtype(q.dtype, keys.size(1))
    inputs = [_take(x, index, dtype) for x, index in ((grad, queries), (q, queries), (k, keys), (v, keys))]
    inputs.append(_take(output, queries, dtype))
    lse = _take(log_sum, queries, torch.float32)
    if real is not None:  # exp(score - inf) = 0: rows that only fill up must not weigh on keys that they may see
        lse = lse.masked_fill(~real[:, :, None], math.inf)
    parts = FLASH_BACKWARD(*(x.transpose(1, 2) for x in inputs), lse.transpose(1, 2), 0.0, causal, scale=scale)
    return [part.transpose(1, 2) for part in parts]


def _compute_dtype(dtype: torch.dtype, length: int) -> torch.dtype:
    return torch.float32 if length < SHORT else dtype


def _take(rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, ...] by index [pieces, length]; no copy where one piece is all rows in order."""
    if index.shape == (1, len(rows)):
        return rows[None].to(dtype)
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:]).to(dtype)


def _put(whole: Tensor, bucket: Bucket, part: Tensor) -> None:
    _put_rows(whole, bucket.queries, bucket.real, part)


def _put_rows(whole: Tensor, index: Tensor, real: Tensor | None, part: Tensor) -> None:
    """Write each real row of a part to its place."""
    if index.shape == (1, len(whole)):
        whole.copy_(part[0])
    elif real is None:
        whole.index_copy_(0, index.flatten(), part.flatten(0, 1).to(whole.dtype))
    else:
        whole.index_copy_(0, index[real], part[real].to(whole.dtype))


def _merge(output: Tensor, log_sum: Tensor, rows: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join attention over other keys into that of some rows: softmax over both."""
    before = log_sum[rows]
    both = torch.logaddexp(before, lse)
    mixed = output[rows] * (before - both).exp()[..., None] + out * (lse - both).exp()[..., None]
    output[rows] = mixed.to(output.dtype)
    log_sum[rows] = both
