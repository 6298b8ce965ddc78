"""One optimizer step and one validation pass: the hot path."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
from megachameleon.training.batches import Batch, Samples, training_batches, validation_batches
from megachameleon.training.losses import LossReport, forward_step, reduce_sums, report_from_sums


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a step works on."""

    model: Chunks
    """This process's part of the model, wrapped: one chunk, or several under the interleaved schedule."""
    optimizer: Any
    schedule: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step says."""

    losses: LossReport
    grad_norm: float
    lr: float


def train_step(
    state: TrainingState, samples: Samples, config: RunConfig, context: ParallelContext, *, step: int, consumed: int
) -> StepReport:
    """Read the global batch at position `consumed`, go forward and backward, and update.

    Args:
        step: optimizer steps done before this one.

    Raises:
        FloatingPointError: the loss or the gradient norm is not finite. Both are read together at the end, so that the
            host waits for the device once a step; the fused update skips itself then, and nothing is saved.
    """
    seed_step(config.training.seed, step, context)
    for chunk in state.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    state.optimizer.zero_grad()
    num_micro_batches = config.training.num_micro_batches(context.data_parallel)
    size = config.training.micro_batch_size
    batches = training_batches(samples, consumed, num_micro_batches, size, context)
    sums = _run_schedule(state.model, batches, num_micro_batches, config, context, forward_only=False)
    lr = set_learning_rate(state.schedule, step + 1)
    norm = optimizer_step(state.optimizer, config.optimizer.clip_grad, num_tokens=sums[-2:].sum())
    *read_sums, grad_norm = torch.cat((sums, norm.double()[None])).tolist()
    losses = report_from_sums(read_sums)
    if not math.isfinite(losses.loss):
        raise FloatingPointError(f"step {step + 1}: loss is {losses.loss}; the last checkpoint is untouched")
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"step {step + 1}: gradient norm is {grad_norm}; the last checkpoint is untouched")
    return StepReport(losses=losses, grad_norm=grad_norm, lr=lr)


@torch.no_grad()
def validate(model: Chunks, samples: FirstSamples, config: RunConfig, context: ParallelContext) -> LossReport:
    """Losses over the first samples of a validation set."""
    for chunk in model:
        chunk.eval()
    size = config.training.micro_batch_size
    per_pass = context.data_parallel * size
    num_micro_batches = -(-len(samples) // per_pass)
    if len(model) > 1:  # the interleaved schedule takes whole rounds of the pipeline; the last one is padded
        stages = context.config.pipeline_parallel
        num_micro_batches = -(-num_micro_batches // stages) * stages
    batches = validation_batches(samples, 0, num_micro_batches, size, context)
    sums = _run_schedule(model, batches, num_micro_batches, config, context, forward_only=True)
    for chunk in model:
        chunk.train()
    return report_from_sums(sums.tolist())


def _run_schedule(
    model: Chunks,
    batches: Iterator[Batch],
    num_micro_batches: int,
    config: RunConfig,
    context: ParallelContext,
    *,
    forward_only: bool,
) -> torch.Tensor:
    """Let megatron-core's schedule drive micro-batches through this process's pipeline stage; sums for the report."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs = get_forward_backward_func()(
        forward_step_func=partial(
            forward_step, z_loss=config.training.z_loss, isolate_documents=config.data.isolate_documents
        ),
        data_iterator=list(tee(batches, len(model))) if len(model) > 1 else batches,
        model=model,
        num_microbatches=num_micro_batches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    return reduce_sums(outputs, context)
