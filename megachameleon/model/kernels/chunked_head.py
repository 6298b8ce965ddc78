"""Linear head, cross entropy and z-loss in one operation that never holds the logits of all tokens.

The loss is L = sum_i w_i (lse_i - z_iy + c lse_i^2), where z = x W^T, lse_i = log sum_j exp z_ij and y is the label, so
dL/dz_ij = w_i (1 + 2 c lse_i) exp(z_ij - lse_i) - w_i [j = y]. Every gradient is known once lse is, so forward computes
them all and backward only hands them over: three matrix products, none of them twice.

Tokens go in chunks, which bounds memory. Within a chunk the vocabulary goes in blocks that stay in the cache: first all
blocks for lse, then all for the gradients. Ranks that share the vocabulary exchange two floats a token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megachameleon.model.head import Targets, loss_sums
from megachameleon.model.kernels.linear import add_product
from megachameleon.model.main_grad import added_to_main_grad

# On a CPU exp2 of a multiple takes an eighth of the time of exp in fp32.
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How much is computed at a time."""

    tokens: int
    """Rows of hidden states."""
    vocabulary: int
    """Ids, that is columns of logits, of this rank."""


# Measured: the whole vocabulary at once takes a fifth longer; half or twice these sizes, as long.
CPU_SIZES = BlockSizes(tokens=1024, vocabulary=2048)
# Not chosen by measurement yet. 1 << 30: the whole vocabulary in one block.
GPU_SIZES = BlockSizes(tokens=2048, vocabulary=1 << 30)


class ChunkedHead:
    """See `reference.head_loss`. Gradients are computed at once, unless autograd is off.

    Where megatron-core's DistributedDataParallel has given the weight a `main_grad`, its gradient is added there, in
    forward. The gradient of element 0 must then be 1 in backward, and of the others 0, or backward raises.
    """

    def __init__(self, sizes: BlockSizes | None = None) -> None:
        """`sizes`: None takes what suits the device."""
        self._sizes = sizes
        self._kept: dict[str, Tensor] = {}

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Targets, group: Any, sequence_parallel: bool) -> Tensor:
        """Sums of `loss_sums`."""
        return _HeadFunction.apply(hidden, weight, targets, group, sequence_parallel, self, torch.is_grad_enabled())

    def sizes(self, device: torch.device) -> BlockSizes:
        """How much is computed at a time."""
        return self._sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)

    def memory(self, name: str, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised [numel]. On the CPU it is kept for the next micro-batch: the system takes longer to hand out
        fresh memory than we to fill it."""
        if like.is_cuda:  # torch keeps it
            return like.new_empty(numel, dtype=dtype)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < numel or kept.dtype != dtype or kept.device != like.device:
            kept = self._kept[name] = like.new_empty(numel, dtype=dtype)
        return kept[:numel]


class _HeadFunction(torch.autograd.Function):
    """Gradients in forward.

    The schedule runs backward of every micro-batch whose forward it ran, and all of them before gradients are reduced:
    DistributedDataParallel reduces from the hook that backward of the *last* micro-batch fires, and `zero_grad_buffer`
    clears both `main_grad` and `grad_added_to_main_grad` before the next step's first forward. So it does not matter
    that `main_grad` is written earlier than the hook expects. A forward with autograd on whose backward never comes
    would leave its gradient behind; nothing here does that.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, group, sequence_parallel, head, with_gradient):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        whole = gather_from_sequence_parallel_region(hidden, group=group) if sequence_parallel else hidden
        gradients = _Gradients(whole, weight) if with_gradient else None
        sums = _run(whole.flatten(0, 1), weight, targets, group, head, gradients)
        if gradients:
            ctx.save_for_backward(gradients.of_hidden(hidden, group, sequence_parallel), gradients.of_weight(weight))
        return sums

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        first = torch.zeros_like(upstream)
        first[0] = 1
        # Asynchronous: the host need not wait for the device to look.
        torch._assert_async((upstream == first).all(), "head: the gradient of the loss must be 1, of other sums 0")
        return *ctx.saved_tensors, None, None, None, None, None


class _Gradients:
    """Where the gradients of one micro-batch are gathered."""

    def __init__(self, whole: Tensor, weight: Tensor) -> None:
        self.hidden = torch.empty_like(whole).flatten(0, 1)
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.in_place = main_grad is not None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad

    def of_hidden(self, hidden: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
        """Summed over ranks that share the vocabulary, in the shape of `hidden`, [s (/ ranks), b, h]."""
        whole = self.hidden.view(-1, *hidden.shape[1:])
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(whole, group=group)
        return reduce_from_tensor_model_parallel_region(whole, group)

    def of_weight(self, weight: Tensor) -> Tensor:
        """What autograd is told: the gradient [vocabulary, h], or a stand-in where it is in `main_grad` already."""
        return added_to_main_grad(weight) if self.in_place else self.weight.to(weight.dtype)


def _run(
    tokens: Tensor, weight: Tensor, targets: Targets, group: Any, head: ChunkedHead, gradients: _Gradients | None
) -> Tensor:
    """Sums over tokens [n, h]; fills `gradients`."""
    labels, weights, _ = targets.by_token()
    sizes = head.sizes(tokens.device)
    work = _Workspace(weight, min(sizes.tokens, len(tokens)), sizes.vocabulary, group, head)
    nll, log_z = (torch.empty(len(tokens), dtype=torch.float32, device=tokens.device) for _ in range(2))
    for start in range(0, len(tokens), sizes.tokens):
        part = slice(start, start + sizes.tokens)
        x, own_labels, own_weights = tokens[part], labels[part], weights[part]
        nll[part], log_z[part] = work.forward(x, own_labels)
        if gradients:
            scale = own_weights * (1 + 2 * targets.z_loss * log_z[part])
            gradients.hidden[part] = work.backward(x, own_labels, log_z[part], scale, own_weights, gradients.weight)
    return loss_sums(nll, log_z, targets)


class _Workspace:
    """Buffers of one chunk of tokens, used again for the next."""

    def __init__(self, weight: Tensor, num_tokens: int, block: int, group: Any, head: ChunkedHead) -> None:
        self.weight, self.group = weight, group
        self.block = min(block, len(weight))
        self.first_id = group.rank() * len(weight)
        self.logits = head.memory("logits", num_tokens * len(weight), weight, weight.dtype)
        # CUDA's passes over a block are compiled and need no fp32 copy of it.
        self.wide = head.memory("wide", 0 if weight.is_cuda else num_tokens * self.block, weight, torch.float32)

    def blocks(self, num_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight, and their logits [num_tokens, rows]: each block on its own in memory."""
        for start in range(0, len(self.weight), self.block):
            stop = min(start + self.block, len(self.weight))
            yield slice(start, stop), self.logits[num_tokens * start : num_tokens * stop].view(num_tokens, -1)

    def widened(self, logits: Tensor) -> Tensor:
        """`logits` in fp32: a copy, or themselves."""
        if logits.dtype == torch.float32:
            return logits
        return self.wide[: logits.numel()].view_as(logits).copy_(logits)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """nll and log Z, fp32 [num_tokens]; leaves the logits in the workspace."""
        parts = []
        for rows, logits in self.blocks(len(x)):
            # Into memory that is there: filling fresh memory takes ten times as long.
            torch.mm(x, self.weight[rows].t(), out=logits)
            local = labels - (self.first_id + rows.start)
            if x.is_cuda:
                parts.append(COMPILED_STATISTICS(logits, local))
            else:
                parts.append(self._statistics(logits, local))
        largest, sums, targets = (torch.stack(part) for part in zip(*parts, strict=True))
        log_z, target = torch.logsumexp(largest + sums.log_(), 0), targets.sum(0)
        if self.group.size() > 1:
            everyone = log_z.new_empty(self.group.size(), 2 * len(x))
            # Both in one message; log Z of the ranks cannot be summed, so all are gathered.
            dist.all_gather_into_tensor(everyone.view(-1), torch.cat((log_z, target)), group=self.group)
            log_z, target = torch.logsumexp(everyone[:, : len(x)], 0), everyone[:, len(x) :].sum(0)
        return log_z - target, log_z

    def backward(
        self, x: Tensor, labels: Tensor, log_z: Tensor, scale: Tensor, weights: Tensor, grad_weight: Tensor
    ) -> Tensor:
        """Gradient of x [num_tokens, h] from the logits in the workspace; adds that of the weight, fp32, to its sum."""
        grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for rows, logits in self.blocks(len(x)):
            local = labels - (self.first_id + rows.start)
            if x.is_cuda:
                grad = COMPILED_GRADIENT(logits, local, log_z, scale, weights)
            else:
                grad = self._gradient(logits, local, log_z, scale, weights)
            add_product(grad_x, grad, self.weight[rows])
            add_product(grad_weight[rows], grad.t(), x)
        return grad_x.to(x.dtype)

    def _statistics(self, logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `statistics`, in the workspace's memory."""
        # Widened first: amax of bf16 takes longer on a CPU than the copy and amax of fp32.
        wide = self.widened(logits)
        column, here = _find(local, logits.size(1))
        target = wide.gather(1, column).masked_fill_(~here, 0).squeeze(1)
        largest = wide.amax(-1)
        # Not in place: fp32 logits are `wide` itself, and the pass for the gradients still needs them.
        shifted = torch.sub(wide, largest.unsqueeze(-1), out=self.wide[: wide.numel()].view_as(wide))
        return largest, shifted.mul_(LOG2_E).exp2_().sum(-1), target

    def _gradient(self, logits: Tensor, local: Tensor, log_z: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
        """See `gradient`, in the place of the logits."""
        grad = self.widened(logits).sub_(log_z.unsqueeze(-1)).mul_(LOG2_E).exp2_().mul_(scale.unsqueeze(-1))
        column, here = _find(local, logits.size(1))
        grad.scatter_add_(1, column, weights.neg().unsqueeze(-1) * here)
        return grad if logits is grad else logits.copy_(grad)


def _find(local: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Column [num_tokens, 1] of each label in a block, some valid one where it is elsewhere, and whether it is here."""
    return local.clamp(0, width - 1).unsqueeze(-1), ((local >= 0) & (local < width)).unsqueeze(-1)


def statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block of logits [num_tokens, rows]: the largest, the sum of exp(z - largest), and the logit of the label, or
    0 where it is in another block; fp32 [num_tokens] each.

    Args:
        local: int64 [num_tokens], the label's column in this block; outside [0, rows) where it is elsewhere.
    """
    wide = logits.float()
    largest = wide.amax(-1)
    is_label = torch.arange(wide.size(1), device=wide.device) == local.unsqueeze(-1)
    return largest, (wide - largest.unsqueeze(-1)).exp().sum(-1), torch.where(is_label, wide, 0).sum(-1)


def gradient(logits: Tensor, local: Tensor, log_z: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """scale exp(z - log Z) - weight [label], in the dtype of the logits."""
    is_label = torch.arange(logits.size(1), device=logits.device) == local.unsqueeze(-1)
    softmax = (logits.float() - log_z.unsqueeze(-1)).exp()
    return (softmax * scale.unsqueeze(-1) - torch.where(is_label, weights.unsqueeze(-1), 0)).to(logits.dtype)


# Not used on the CPU, where torch.compile needs a C++ compiler, which a newcomer may not have.
COMPILED_STATISTICS = torch.compile(statistics)
COMPILED_GRADIENT = torch.compile(gradient)
"""For CUDA: a pass over the logits each, instead of one for each operation. Compiled when first called."""
