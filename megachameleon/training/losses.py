"""The loss that is learned and the sums that are reported, exact under every layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megachameleon.model.head import Targets
from megachameleon.parallel.context import ParallelContext
from megachameleon.training.batches import Batch
from megachameleon.training.stragglers import ForwardClock

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """Means over tokens that carry loss."""

    loss: float
    """Negative log-likelihood over text and pictures, nats per token."""
    loss_text: float
    """Of tokens whose label is text; NaN where a batch has none."""
    loss_image: float
    """Of picture codes; NaN where a batch has no tokens of the modality."""
    log_z: float
    """Mean log-partition; its growth precedes divergence (arXiv 2405.09818, section 2.3)."""
    log_z_squared: float
    """Mean of its square, which the z-loss keeps down."""
    num_tokens: int
    """Labels that count."""
    num_image_tokens: int
    """Those among them that are picture codes."""


def forward_step(
    batches: Iterator[Batch], model: Any, *, z_loss: float, isolate_documents: bool, clock: ForwardClock
) -> tuple[Tensor, LossFunction]:
    """One micro-batch forward, in the form that megatron-core's schedules call.

    Args:
        isolate_documents: attention and positions within documents; else a sample is one continuous stream.
        clock: takes the time.
    """
    with clock.reading():
        batch = next(batches)
    places = (batch["position_ids"], batch["document_ids"]) if isolate_documents else (None, None)
    targets = Targets(labels=batch["labels"], weights=batch["loss_mask"], is_image=batch["image_mask"], z_loss=z_loss)
    with clock.forward():
        return model(batch["tokens"], *places, targets=targets), loss_and_sums


def loss_and_sums(sums: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Split what the head returns into loss, number of labels that count, and sums to report.

    Args:
        sums: float64 [7] of `head.loss_sums`.

    Returns:
        The loss as a *sum*: the update divides gradients by the global number of labels once, so neither
        micro-batches, nor padding, nor the layout move it. Then the number, int32 [], and the other six sums.
    """
    report = sums.detach()[1:]
    return sums[0], report[-2:].sum().int(), {"sums": report}


def reduce_sums(outputs: list[dict[str, Tensor]], context: ParallelContext) -> Tensor:
    """Sum over micro-batches and over ranks that read other tokens, and tell every pipeline stage: float64 [6]."""
    if context.is_last_stage:
        sums = torch.stack([output["sums"] for output in outputs]).sum(0)
        dist.all_reduce(sums, group=context.groups.dp_cp)
    else:
        # To be filled by the broadcast: only the last stage has seen the loss.
        sums = torch.zeros(6, dtype=torch.float64, device=context.device)
    if context.config.pipeline_parallel > 1:
        dist.broadcast(sums, src=context.last_stage_rank, group=context.groups.pp)
    return sums


def report_from_sums(sums: Sequence[float]) -> LossReport:
    """Means from [nll text, nll image, log Z, log Z squared, text tokens, image tokens]."""
    nll_text, nll_image, log_z, squared, text, image = sums
    total = text + image

    def mean(value: float, count: float) -> float:
        return value / count if count else float("nan")

    return LossReport(
        loss=mean(nll_text + nll_image, total),
        loss_text=mean(nll_text, text),
        loss_image=mean(nll_image, image),
        log_z=mean(log_z, total),
        log_z_squared=mean(squared, total),
        num_tokens=int(total),
        num_image_tokens=int(image),
    )
