"""What a run is expected to hold and to take: memory, step time, throughput, days and money."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from megachameleon.config import RunConfig
from megachameleon.planning.cost import StepTime, cost_of, model_flops_per_second
from megachameleon.planning.hardware import GIB, Cluster
from megachameleon.planning.memory import MemoryParts, memory_of
from megachameleon.planning.shapes import Layout, TransformerShape

USABLE = 0.93
"""Of a GPU's memory; the rest is for the CUDA context, NCCL's buffers, gaps between allocations, and our own error."""

REMEDIES = {
    "weights": "raise parallel.tensor_parallel or parallel.pipeline_parallel",
    "gradients": "raise parallel.tensor_parallel or parallel.pipeline_parallel",
    "optimizer": "split it over more replicas with parallel.distributed_optimizer=true, or raise "
    "parallel.tensor_parallel or parallel.pipeline_parallel",
    "activations": "lower training.micro_batch_size, raise parallel.tensor_parallel with sequence_parallel=true, or "
    "set parallel.recompute=selective",
    "head": "set kernels.loss=torch, lower training.micro_batch_size or raise parallel.tensor_parallel",
    "buffers": "lower training.micro_batch_size or raise parallel.tensor_parallel",
}
OPTIMIZER_IS_SPLIT = "it is split over all GPUs already, so take more of them"
"""The remedy for the optimizer where no replica holds what another has: then its size depends on their number alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One layout of one model on one cluster."""

    shape: TransformerShape
    """The model, and the length of its sequences."""
    layout: Layout
    """How its step is divided."""
    cluster: Cluster
    """On what it runs."""
    memory: MemoryParts
    """Bytes on the fullest stage."""
    time: StepTime
    """Of a step on the slowest stage."""

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.layout.global_batch_size * self.shape.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        return self.tokens_per_step / self.time.total / self.layout.world_size

    @property
    def mfu_causal(self) -> float:
        """Share of the peak in bf16, counting the visible half of attention."""
        return model_flops_per_second(self.shape, self.layout, self.time.total, "causal") / self._peak

    @property
    def mfu_full_attn(self) -> float:
        """The same, counting all of attention."""
        return model_flops_per_second(self.shape, self.layout, self.time.total, "full") / self._peak

    @property
    def memory_gib(self) -> dict[str, float]:
        """By part."""
        return {field.name: getattr(self.memory, field.name) / GIB for field in fields(self.memory)}

    @property
    def total_gib(self) -> float:
        """All parts."""
        return sum(self.memory_gib.values())

    @property
    def usable_gib(self) -> float:
        """Of a GPU of the cluster."""
        return self.cluster.memory_gib * USABLE

    @property
    def fits(self) -> bool:
        """Whether the parts fit in memory."""
        return self.total_gib <= self.usable_gib

    def why_not(self) -> str:
        """One line for a layout that does not fit: by how much, the largest part, and what makes it smaller."""
        part = max(self.memory_gib, key=lambda name: self.memory_gib[name])
        is_split = part == "optimizer" and self.layout.optimizer_shards == self.layout.replicas
        remedy = OPTIMIZER_IS_SPLIT if is_split else REMEDIES[part]
        return (
            f"does not fit: {self.layout.describe()} needs {self.total_gib:.1f} GiB of {self.usable_gib:.1f} usable on "
            f"{self.cluster.name}, {self.total_gib - self.usable_gib:.1f} too much; the largest part is {part}, "
            f"{self.memory_gib[part]:.1f} GiB: {remedy}"
        )

    def gpu_hours(self, tokens: float) -> float:
        """Of a run over so many tokens, without restarts, validation and checkpoints."""
        return tokens / self.tokens_per_second / 3600

    def days(self, tokens: float) -> float:
        """The same on all GPUs of the layout."""
        return self.gpu_hours(tokens) / self.layout.world_size / 24

    def as_plain(self, tokens: float | None = None) -> Mapping[str, object]:
        """Values that JSON can hold; times in seconds, memory in GiB."""
        plain: dict[str, object] = {
            "layout": self.layout.describe(),
            "cluster": self.cluster.name,
            "gpus": self.layout.world_size,
            "fits": self.fits,
            "memory_gib": {**self.memory_gib, "total": self.total_gib, "usable": self.usable_gib},
            "step_seconds": {**self.time.parts(), "total": self.time.total},
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu_causal": self.mfu_causal,
            "mfu_full_attn": self.mfu_full_attn,
        }
        if tokens:
            plain |= {"tokens": tokens, "gpu_hours": self.gpu_hours(tokens), "days": self.days(tokens)}
            if self.cluster.price_per_gpu_hour:
                plain["cost"] = self.gpu_hours(tokens) * self.cluster.price_per_gpu_hour
        return plain

    @property
    def _peak(self) -> float:
        # Also under FP8: MFU is told of the bf16 peak, so that runs can be compared.
        return self.cluster.flops_per_second("bf16")


def estimate_run(config: RunConfig, world_size: int, cluster: Cluster) -> Estimate:
    """Estimate a run.

    Raises:
        ValueError: layout or batch do not divide over the world, or the cluster lacks the precision.
    """
    shape = TransformerShape.from_model(config.model, config.data.sequence_length)
    return estimate(shape, Layout.from_run(config, world_size), cluster)


def estimate(shape: TransformerShape, layout: Layout, cluster: Cluster) -> Estimate:
    """Estimate a layout."""
    return Estimate(
        shape=shape,
        layout=layout,
        cluster=cluster,
        memory=fullest_stage(shape, layout),
        time=cost_of(shape, layout, cluster),
    )


def fullest_stage(shape: TransformerShape, layout: Layout) -> MemoryParts:
    """Memory of the stage that needs most: the first, which holds most micro-batches, or the last, with the head."""
    stages = {0, layout.pipeline_parallel - 1}
    return max((memory_of(shape, layout, stage) for stage in stages), key=_total)


def _total(memory: MemoryParts) -> float:
    return sum(getattr(memory, field.name) for field in fields(memory))
