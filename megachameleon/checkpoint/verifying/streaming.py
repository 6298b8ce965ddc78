"""Running a model that is larger than memory: built without weights, each part of it has them while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[[str, nn.Module], None]
"""Writes the weights of a part, given its name, into its parameters, which have memory by then."""
Advance = Callable[[], None]
"""Called after each part."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a model computes on its way to the logits."""

    hidden: tuple[Tensor, ...]
    """fp32 [b, s, hidden] on the CPU: embeddings, what each block hands on, and that after the final norm."""
    logits: Tensor
    """fp32 [b, s, vocabulary] on the CPU."""


@contextmanager
def streamed(
    parts: Mapping[str, nn.Module], fill: Fill, device: torch.device, rounding: torch.dtype, advance: Advance
) -> Iterator[list[Tensor]]:
    """Within this, a model on the `meta` device can run: its own forward calls the parts, whenever it will.

    Args:
        parts: modules by name that together have all parameters, none inside another; each is called once.
        device: where they run.
        rounding: the weights are rounded to it, and computed with in their own type.

    Yields:
        What the parts have returned, on the CPU, in the order in which they ran.
    """
    outputs: list[Tensor] = []

    def begin(name: str, part: nn.Module) -> None:
        part.to_empty(device=device)
        fill(name, part)
        for parameter in part.parameters():
            # So that a side in fp32 is compared as the conversion has rounded it, and no more.
            parameter.copy_(parameter.to(rounding))

    def end(part: nn.Module, output: Any) -> None:
        # At once: two blocks of a 34B in fp32 are 6 GB.
        part.to("meta")
        outputs.append((output if isinstance(output, Tensor) else output[0]).float().cpu())
        advance()

    handles = []
    for name, part in parts.items():
        handles.append(part.register_forward_pre_hook(lambda part, _, name=name: begin(name, part)))
        handles.append(part.register_forward_hook(lambda part, _, output: end(part, output)))
    try:
        with torch.no_grad():
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
