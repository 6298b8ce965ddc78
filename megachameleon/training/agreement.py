"""What all ranks must see alike before an update: is the step sound, does anybody want to stop, who is slow.

A rank alone may get a signal, a NaN or a slow processor. Each puts its signs into a small vector; one all-gather a step
gives every rank the same table, on the device, so that all decide the same without the host waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megachameleon.parallel.context import ParallelContext


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnSigns:
    """What this rank has to say at a step."""

    stop: int = 0
    """What asks it to save and stop: a signal's number, or a code of `stopping`; 0: nothing."""
    busy_seconds: float = 0.0
    """Time that it worked in the step before, without waiting for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """The largest values with which a step may update the weights."""

    loss: float = float("inf")
    """Nats per token."""
    grad_norm: float = float("inf")
    """Before clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The same on all ranks."""

    stop: int = 0
    """What asks any of them to save and stop; 0: nothing."""
    stop_rank: int = 0
    """The first that was asked."""
    loss: float = 0.0
    """The largest of all ranks; they differ by rounding only, unless something is broken."""
    grad_norm: float = 0.0
    """The largest as well, before clipping."""
    sums: tuple[float, ...] = ()
    """Those behind the loss, of the rank that has it."""
    busy_seconds: tuple[float, ...] = ()
    """By rank."""


NUM_SIGNS = 9
"""Stop, busy seconds, gradient norm, and the six sums of the loss (`losses.report_from_sums`)."""


def gather_signs(own: OwnSigns, sums: Tensor, grad_norm: Tensor, context: ParallelContext) -> Tensor:
    """All ranks' signs, float64 [world_size, 9].

    Args:
        sums: float64 [6] of `losses.reduce_sums`; equal on all ranks, unless one of them is broken.
        grad_norm: float32 [], as well.
    """
    said = torch.tensor([float(own.stop), own.busy_seconds], dtype=torch.float64)
    mine = torch.cat((said.to(context.device, non_blocking=True), grad_norm.double()[None], sums))
    # On the device: the update must not wait for the host to look at it.
    table = torch.empty(context.world_size * NUM_SIGNS, dtype=torch.float64, device=context.device)
    dist.all_gather_into_tensor(table, mine)
    return table.view(context.world_size, NUM_SIGNS)


def refuses_update(table: Tensor, limits: StepLimits) -> Tensor:
    """Whether the update must be left out, bool [] on the device. NaN is refused, since it is not below any limit."""
    grad_norm, sums = table[:, 2], table[:, 3:]
    # A batch may have no label: at least 1.
    loss = sums[:, :2].sum(1) / sums[:, -2:].sum(1).clamp(min=1)
    sound = loss.isfinite() & grad_norm.isfinite() & (loss <= limits.loss) & (grad_norm <= limits.grad_norm)
    return ~sound.all()


def read_agreement(values: Sequence[float]) -> Agreement:
    """From the flattened table, on the host."""
    rows = [values[start : start + NUM_SIGNS] for start in range(0, len(values), NUM_SIGNS)]
    stop_rank, stop = next(((rank, int(row[0])) for rank, row in enumerate(rows) if row[0]), (0, 0))
    # The same formulas as in `refuses_update`: what is said must be what the device has decided.
    losses = [(row[3] + row[4]) / max(row[-2] + row[-1], 1) for row in rows]
    worst = _largest(losses)
    return Agreement(
        stop=stop,
        stop_rank=stop_rank,
        busy_seconds=tuple(row[1] for row in rows),
        loss=losses[worst],
        grad_norm=rows[_largest([row[2] for row in rows])][2],
        sums=tuple(rows[worst][3:]),
    )


def any_asks(stop: int, context: ParallelContext) -> int:
    """The largest of all ranks' requests to stop, outside of steps; waits for all of them."""
    code = torch.tensor([stop], device=context.device)
    dist.all_reduce(code, op=dist.ReduceOp.MAX)
    return int(code)


def why_skipped(agreement: Agreement, limits: StepLimits) -> str | None:
    """The reason for which the step did not update, in words; None if it did. Says what `refuses_update` decided."""
    for name, value, limit in (
        ("loss", agreement.loss, limits.loss),
        ("gradient norm", agreement.grad_norm, limits.grad_norm),
    ):
        if not abs(value) < float("inf"):
            return f"{name} is {value}"
        if value > limit:
            return f"{name} {value:.4g} is beyond {limit:.4g}"
    return None


def _largest(values: Sequence[float]) -> int:
    """Where the first NaN stands, else the first of the largest."""
    # Only a NaN differs from itself.
    return next((i for i, value in enumerate(values) if value != value), values.index(max(values)))
