"""What the processes that train an image tokenizer together tell each other."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

MESSAGE_NUMBERS = 1 << 24
"""Numbers in one message, so that the copy that is sent stays small beside a network."""


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each float tensor by its mean over the processes, in place; several tensors travel in one message."""
    if not dist.is_initialized():
        return
    batch: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if batch and numbers + tensor.numel() > MESSAGE_NUMBERS:
            _average_together(batch)
            batch, numbers = [], 0
        batch.append(tensor)
        numbers += tensor.numel()
    if batch:
        _average_together(batch)


def gathered(tensor: Tensor) -> Tensor:
    """[N, ...] of every process, one process after the other: [world * N, ...]."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def of_all_processes(value: Value) -> list[Value]:
    """What each process gives, in their order."""
    if not dist.is_initialized():
        return [value]
    everybody = [value] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def _average_together(tensors: Sequence[Tensor]) -> None:
    # fp32, in which sums of many processes lose little
    flat = torch.cat([tensor.float().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
