"""One optimizer step and one validation pass: the hot path."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from typing import Any

import torch

from megachameleon.config import RunConfig
from megachameleon.data.blending.blending import FirstSamples
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.optimizer import optimizer_step, set_learning_rate
from megachameleon.parallel.replicas import Chunks
from megachameleon.parallel.seeding import seed_step
from megachameleon.training.agreement import (
    Agreement,
    OwnSigns,
    StepLimits,
    gather_signs,
    read_agreement,
    refuses_update,
    why_skipped,
)
from megachameleon.training.batches import Batch, Samples, training_batches, validation_batches
from megachameleon.training.losses import LossReport, forward_step, reduce_sums, report_from_sums
from megachameleon.training.monitors.base import Monitor, reduce_monitors, report_monitors
from megachameleon.training.stragglers import ForwardClock


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a step works on."""

    model: Chunks
    """This process's part of the model, wrapped: one chunk, or several under the interleaved schedule."""
    optimizer: Any
    """megatron-core's, over `model`."""
    schedule: Any
    """megatron-core's OptimizerParamScheduler; see `set_learning_rate`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step says; the same on all ranks."""

    losses: LossReport
    grad_norm: float
    """L2 over all parameters, of the mean loss, before clipping."""
    lr: float
    """Of this step's update."""
    skipped: str | None = None
    """Why weights and moments were left as they were; None if they were updated."""
    monitors: dict[str, float] = field(default_factory=dict)
    """What the monitors measured, by name; empty at steps at which they rest."""
    agreement: Agreement = field(default_factory=Agreement)
    """What all ranks said of the step."""


def train_step(
    state: TrainingState,
    samples: Samples,
    config: RunConfig,
    context: ParallelContext,
    *,
    step: int,
    consumed: int,
    own: Callable[[], OwnSigns] = OwnSigns,
    limits: StepLimits | None = None,
    lr_factor: float = 1.0,
    monitors: Sequence[Monitor] = (),
    clock: ForwardClock | None = None,
) -> StepReport:
    """Read the global batch at position `consumed`, go forward and backward, and update unless the step is unsound.

    The host waits for the device once, at the end.

    Args:
        step: optimizer steps done before this one.
        own: what this rank has to tell the others; asked as late as possible, for a signal to count at this step.
        limits: the largest loss and gradient norm with which to update; what is not finite never updates.
        clock: takes the time of forward passes.
    """
    limits = limits or StepLimits()
    seed_step(config.training.seed, step, context)
    for chunk in state.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    state.optimizer.zero_grad()
    for monitor in monitors:
        monitor.begin(step + 1)
    num_micro_batches = config.training.num_micro_batches(context.data_parallel)
    size = config.training.micro_batch_size
    batches = training_batches(samples, consumed, num_micro_batches, size, context)
    for monitor in monitors:
        batches = monitor.follow(batches)
    sums = _run_schedule(state.model, batches, num_micro_batches, config, context, clock, forward_only=False)
    for monitor in monitors:
        monitor.after_backward(state)
    # Before the update, so that the first one has a rate above zero.
    lr = set_learning_rate(state.schedule, step + 1, lr_factor)
    table = _update(state, config, context, sums, own, limits)
    for monitor in monitors:
        monitor.after_update(state)
    measured, sizes = reduce_monitors(monitors, context)
    # The only wait for the device in a step: all that the host wants to know is in one tensor.
    values = torch.cat((table.flatten(), measured)).tolist()
    agreement = read_agreement(values[: table.numel()])
    return StepReport(  # from the table alone, so that ranks agree even if one of them computes nonsense
        losses=report_from_sums(agreement.sums),
        grad_norm=agreement.grad_norm,
        lr=lr,
        skipped=why_skipped(agreement, limits),
        monitors=report_monitors(monitors, sizes, values[table.numel() :]),
        agreement=agreement,
    )


def _update(
    state: TrainingState,
    config: RunConfig,
    context: ParallelContext,
    sums: torch.Tensor,
    own: Callable[[], OwnSigns],
    limits: StepLimits,
) -> torch.Tensor:
    """Update the weights if all ranks find the step sound; returns the table of their signs."""
    tables: list[torch.Tensor] = []

    def refuses(norm: torch.Tensor) -> torch.Tensor:
        tables.append(gather_signs(own(), sums, norm, context))
        return refuses_update(tables[0], limits)

    optimizer_step(state.optimizer, config.optimizer.clip_grad, sums[-2:].sum(), refuses)
    return tables[0]


ROUND_MICRO_BATCHES = 32
"""Micro-batches of a validation in one go; between them it may end."""


@torch.no_grad()
def validate(
    model: Chunks,
    samples: FirstSamples,
    config: RunConfig,
    context: ParallelContext,
    between: Callable[[], None] = lambda: None,
) -> LossReport:
    """Losses over the first samples of a validation set.

    Args:
        between: called now and then, by all ranks alike; what it raises ends the validation.
    """
    size = config.training.micro_batch_size
    per_pass = context.data_parallel * size
    num_micro_batches = -(-len(samples) // per_pass)
    if len(model) > 1:  # the interleaved schedule takes whole rounds of the pipeline; the last one is padded
        stages = context.config.pipeline_parallel
        num_micro_batches = -(-num_micro_batches // stages) * stages
    per_round = ROUND_MICRO_BATCHES * context.config.pipeline_parallel  # the pipeline fills and drains in each
    sums: torch.Tensor | float = 0.0
    for chunk in model:
        chunk.eval()
    try:
        for first in range(0, num_micro_batches, per_round):
            between()
            count = min(per_round, num_micro_batches - first)
            batches = validation_batches(samples, first * per_pass, count, size, context)
            sums = sums + _run_schedule(model, batches, count, config, context, None, forward_only=True)
    finally:
        for chunk in model:
            chunk.train()
    return report_from_sums(torch.as_tensor(sums).tolist())


def _run_schedule(
    model: Chunks,
    batches: Iterator[Batch],
    num_micro_batches: int,
    config: RunConfig,
    context: ParallelContext,
    clock: ForwardClock | None,
    *,
    forward_only: bool,
) -> torch.Tensor:
    """Let megatron-core's schedule drive micro-batches through this process's pipeline stage; sums for the report."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # Under the interleaved schedule each chunk reads the same micro-batches by an iterator of its own.
    outputs = get_forward_backward_func()(
        forward_step_func=partial(
            forward_step,
            z_loss=config.training.z_loss,
            isolate_documents=config.data.isolate_documents,
            clock=clock or ForwardClock(context.device),
        ),
        data_iterator=list(tee(batches, len(model))) if len(model) > 1 else batches,
        model=model,
        num_microbatches=num_micro_batches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    return reduce_sums(outputs, context)
