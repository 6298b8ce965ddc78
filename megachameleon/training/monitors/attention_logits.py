"""How large the scores of attention are, by block; their growth is what QK-norm is there to stop.

The scores themselves are never in memory, so their maximum is boxed in. `attention_logit_bound/<block>` is an upper
bound (Cauchy-Schwarz): over heads, the largest query norm of the batch times the largest key norm times the scale.
`attention_logit_sampled/<block>` is the true maximum over some queries of each sequence and all keys that these see.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachameleon.model.sequence_layout import AttentionInputs
from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch

SAMPLED_QUERIES = 16
"""Of each sequence, evenly spread; the same ones at every layout whose parts of a sequence they divide."""


class AttentionLogits(Monitor):
    """After QK-norm, with RoPE, before softmax. Padding is left out, where documents are isolated."""

    def __init__(self, watch: ForwardWatch, num_layers: int, num_heads: int, num_keys: int, every: int) -> None:
        """
        Args:
            num_keys: key heads (query groups) of the model.
        """
        self.watch, self.every = watch, every
        self.num_heads, self.num_keys, self.scale = num_heads, num_keys, 1.0
        self._active = False
        self._maxima = torch.zeros(num_layers, num_heads + num_keys + 1, device=watch.context.device)
        for number, layer in watch.layers():
            attention: Any = layer.self_attention.core_attention  # type: ignore[union-attr]
            attention.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            self.scale = float(attention.scale)

    def begin(self, step: int) -> None:
        """Clear."""
        self._active = step % self.every == 0
        self._maxima[:, :-1] = 0
        self._maxima[:, -1] = -math.inf

    def maxima(self) -> Tensor | None:
        """By block: largest norm of each query head, of each key head, and the largest sampled score; float64."""
        return self._maxima.double().flatten() if self._active else None

    def report(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        """Bound and sampled maximum of each block."""
        report, width = {}, self._maxima.size(1)
        for layer in range(self._maxima.size(0)):
            *norms, sampled = maxima[layer * width : (layer + 1) * width]
            queries, keys = norms[: self.num_heads], norms[self.num_heads :]
            # Each key head serves a run of query heads.
            bound = max(query * keys[head * self.num_keys // self.num_heads] for head, query in enumerate(queries))
            report[f"attention_logit_bound/{layer}"] = self.scale * bound
            if sampled > -math.inf:
                report[f"attention_logit_sampled/{layer}"] = sampled
        return report

    def _hook(self, layer: int) -> Any:
        @torch.no_grad()
        def measure(attention: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._active and self.watch.inside:
                query, key = arguments[0].detach(), arguments[1].detach()
                self._note_norms(self._maxima[layer], query, key)
                sampled = self._sample(attention, query, key, named["packed_seq_params"])
                self._maxima[layer, -1] = torch.maximum(self._maxima[layer, -1], sampled)

        return measure

    def _note_norms(self, maxima: Tensor, query: Tensor, key: Tensor) -> None:
        """Of the heads of this tensor-parallel rank; RoPE turns vectors and leaves their norms."""
        real = None if self.watch.document_ids is None else (self._own_documents(query.size(0)) >= 0)[..., None]
        for x, first in ((query, 0), (key, self.num_heads)):
            # The bound needs norms alone, which cost next to nothing; no kernel keeps the scores.
            norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            norms = norms if real is None else norms * real
            start = first + self.watch.context.tensor_rank * x.size(2)
            here = maxima[start : start + x.size(2)]
            here.copy_(torch.maximum(here, norms.amax((0, 1))))

    def _own_documents(self, length: int) -> Tensor:
        """int [s, b]: the document of each position that is here."""
        assert self.watch.document_ids is not None
        return self.watch.document_ids[:, self.watch.positions(self.watch.context.context_rank, length)].t()

    def _sample(self, attention: Any, query: Tensor, key: Tensor, inputs: AttentionInputs) -> Tensor:
        """Largest score [] of the sampled queries of all context-parallel ranks with the keys that are here."""
        context = self.watch.context
        length, group = query.size(0), context.groups.cp
        stride = max(min(length * group.size() // SAMPLED_QUERIES, length // min(group.size(), 2)), 1)
        rows = slice(stride - 1, None, stride)
        cos, sin = inputs.query_rotary
        queries = attention.kernels.rotary(query[rows], cos[rows], sin[rows]).float()
        keys = attention.kernels.rotary(key, *inputs.key_rotary).float()
        if group.size() > 1:
            # The few queries travel to the keys, not all keys to them.
            gathered = queries.new_empty(group.size() * queries.size(0), *queries.shape[1:])
            dist.all_gather_into_tensor(gathered, queries.contiguous(), group=group)
            queries = gathered
        places = torch.cat([self.watch.positions(rank, length)[rows] for rank in range(group.size())])
        visible = places[:, None] >= self.watch.positions(group.rank(), length)  # [queries, keys]
        if self.watch.document_ids is None:
            visible = visible[:, :, None]
        else:
            documents, others = self.watch.document_ids[:, places].t(), self._own_documents(length)
            same = (documents[:, None] == others) & (documents[:, None] >= 0)  # [queries, keys, b]
            visible = visible[:, :, None] & same
        scores = torch.einsum("qbgnd,kbgd->qkbgn", queries.unflatten(2, (key.size(2), -1)), keys)
        return scores.masked_fill(~visible[..., None, None], -math.inf).amax() * self.scale
