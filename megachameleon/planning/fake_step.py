"""One rank's part of a run of any size, built and trained for a step on tensors without memory, in a fake world.

Everything is the real thing but for three: tensors are torch's fake ones, which have shapes and no contents;
collectives and transfers of torch's fake backend end at once; numbers that the host reads are 1. So the real model, the
real optimizer and megatron-core's real schedule run through, and what they allocate and send is counted.

Tensors are the CPU's, because torch cannot run backward for a device that it was not built for; `like_cuda.py` makes up
for the difference. Each row of a batch is one document.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from megachameleon.config import RunConfig
from megachameleon.config.kernels import OPERATIONS
from megachameleon.data.samples import Sample
from megachameleon.model.decoder import Decoder, build_chunks
from megachameleon.model.kernels.table import Attention, Kernels, choose_kernels
from megachameleon.model.sequence_layout import SequenceLayout
from megachameleon.parallel.context import ParallelContext, model_axes
from megachameleon.parallel.device import install
from megachameleon.parallel.optimizer import build_optimizer, build_schedule
from megachameleon.parallel.replicas import wrap_replicas
from megachameleon.planning.counting import Part, Traffic, Volume, Watch
from megachameleon.planning.like_cuda import kernels_like_cuda, operations_like_cuda
from megachameleon.training.step import TrainingState, train_step

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCount:
    """What one rank of a run holds and sends."""

    rank: int
    """Global, from 0."""
    stage: int
    """Of the pipeline."""
    layers: int
    """That it holds, over all its chunks."""
    parameters: int
    """Values that it holds of all parameters."""
    peak: dict[Part, int]
    """Bytes by part at the moment when most is allocated."""
    traffic: Traffic
    """Messages of one step."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def count_rank(
    config: RunConfig, rank: int, world_size: int, *, train: bool = True, like_cuda: bool = True
) -> RankCount:
    """Build and train a rank's part on fake tensors.

    Steps have only as many micro-batches as the pipeline holds at once, so that memory reaches its peak. Traffic is
    counted in two steps of different length and continued along the line through them: each further round of
    micro-batches is like the one before.

    Args:
        config: with a resolved precision; the world must divide.
        train: False builds the model and no more.
        like_cuda: allocate as on CUDA; else as on the CPU.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank: {rank} is not one of the {world_size} processes; take 0 to {world_size - 1}")
    install(CPU)
    lengths, unit = _steps_to_run(config, world_size)
    real = config.training.num_micro_batches(config.parallel.data_parallel(world_size))
    with _fake_world(config, rank, world_size) as context, FakeTensorMode(allow_non_fake_inputs=True):
        watch = Watch(axes_of(context.groups), pretend=True)
        with watch, operations_like_cuda() if like_cuda else nullcontext():
            kernels = _countable(config, like_cuda=like_cuda)
            decoders = build_decoders(config, context, watch, kernels)
            traffic: list[Traffic] = []
            if train:
                state = wrap_for_training(decoders, config, watch, kernels)
                traffic = [run_step(state, config, context, watch, length) for length in lengths]
            return RankCount(
                rank=rank,
                stage=context.pipeline_rank,
                layers=sum(len(decoder.decoder.layers) for decoder in decoders),
                parameters=sum(p.numel() for decoder in decoders for p in decoder.parameters()),
                peak=watch.memory.peak,
                traffic=_continued(traffic, (real - lengths[0]) // unit) if train else {},
            )


def axes_of(groups: Any) -> dict[str, str]:
    """Process group name to the axis that it stands for, for groups of megatron-core's collection and the world."""
    names = {
        "tp": "tensor",
        "pp": "pipeline",
        "cp": "context",
        "dp": "data",
        "dp_cp": "data",
        "mp": "model",
        "intra_dist_opt": "world",
    }
    world: Any = dist.group.WORLD
    axes = {world.group_name: "world"}
    for field, axis in names.items():
        group = getattr(groups, field, None)
        if group is not None:
            axes.setdefault(group.group_name, axis)
    return axes


def build_decoders(config: RunConfig, context: ParallelContext, watch: Watch, kernels: Kernels) -> list[Decoder]:
    """This rank's chunks of the model, uninitialised."""
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    with watch.part("weights"), _default_dtype(dtype):
        decoders = build_chunks(config.model, config.parallel, kernels, context.groups, dtype=dtype, seed=None)
    for decoder in decoders:  # torch fails to convert fake parameters in place, and these have their dtype already
        decoder.bfloat16 = lambda decoder=decoder: decoder
    return decoders


def wrap_for_training(decoders: list[Decoder], config: RunConfig, watch: Watch, kernels: Kernels) -> TrainingState:
    """What the trainer makes of the model, counted by part."""
    with watch.part("gradients"):
        model = wrap_replicas(decoders, config.parallel)
    for chunk in model:
        for parameter in chunk.parameters():  # the distributed optimizer has moved them into one buffer
            watch.memory.assign(parameter, "weights")
    with watch.part("optimizer"):
        optimizer = build_optimizer(model, config.optimizer, config.parallel, kernels.resolved)
        schedule = build_schedule(optimizer, config.optimizer, config.training.num_steps)
    return TrainingState(model=model, optimizer=optimizer, schedule=schedule)


def run_step(
    state: TrainingState, config: RunConfig, context: ParallelContext, watch: Watch, micro_batches: int
) -> Traffic:
    """Train one step of some micro-batches; returns what it sent. `watch` then has the peak of this step."""
    size = config.training.micro_batch_size * context.data_parallel * micro_batches
    config = replace(config, training=replace(config.training, global_batch_size=size))
    # Tensors that only cycles keep would count as live.
    gc.collect()
    watch.memory.assign_all("activations", "buffers")  # what outlives a step
    watch.memory.forget_peak()
    watch.traffic = {}
    with watch.follow(state.model):
        train_step(state, _OneDocument(config.data.sequence_length), config, context, step=0, consumed=0)
    return watch.traffic


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _OneDocument:
    """Samples of one document each."""

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, positions: Sequence[int], /) -> Sample:
        """Token 0 everywhere."""
        shape = (len(positions), self.length)
        sample = Sample.empty(*shape)
        for field in fields(Sample):
            getattr(sample, field.name).fill(0)
        sample.loss_mask.fill(1)
        sample.position_ids[:] = np.arange(self.length)
        return sample


def _steps_to_run(config: RunConfig, world_size: int) -> tuple[list[int], int]:
    """Micro-batches of a short and perhaps of a longer step, and by how many at a time a step grows."""
    parallel = config.parallel
    real = config.training.num_micro_batches(parallel.data_parallel(world_size))
    interleaved = parallel.virtual_pipeline_parallel > 1
    unit = parallel.pipeline_parallel if interleaved else 1
    # As many as are in flight at once: with fewer the peak would be missed.
    short = min(real, parallel.pipeline_parallel * (2 if interleaved else 1))
    return sorted({short, min(real, short + unit)}), unit


def _continued(traffic: list[Traffic], units: int) -> Traffic:
    """The line through one or two counts, `units` after the first."""
    first, last = traffic[0], traffic[-1]
    result = {}
    for key in sorted({*first, *last}):
        start, step = first.get(key, Volume()), last.get(key, Volume()) - first.get(key, Volume())
        result[key] = Volume(start.count + units * step.count, start.bytes + units * step.bytes)
    return result


def _countable(config: RunConfig, *, like_cuda: bool) -> Kernels:
    """The configured kernels, or torch's in place of those that fake CPU tensors cannot run."""
    asked = config.kernels
    plain: dict[str, Any] = {name: "auto" for name in OPERATIONS if getattr(asked, name) not in ("reference", "torch")}
    kernels = choose_kernels(replace(asked, **plain, fp8="none", userbuffers=False), "cpu")
    kernels = replace(kernels, attention=_PlansOnRealTensors(kernels.attention))
    return kernels_like_cuda(kernels, config) if like_cuda else kernels


class _PlansOnRealTensors:
    """An attention kernel whose plan, which depends on contents, is made for one document a row."""

    def __init__(self, kernel: Attention) -> None:
        self.kernel = kernel

    def plan(self, layout: SequenceLayout) -> Any:
        """The plan, on fake tensors."""
        mode = active_fake_mode()
        # Its shape depends on values, which fake tensors do not have.
        with _disable_current_modes():
            plan = self.kernel.plan(replace(layout, document_ids=None))
        return _faked(plan, mode)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, scale: float
    ) -> torch.Tensor:
        """Attend."""
        return self.kernel(query, key, value, plan, scale)


def _faked(value: Any, mode: Any) -> Any:
    """A plan with its tensors replaced by fake ones."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list):
        return [_faked(entry, mode) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _faked(getattr(value, field.name), mode) for field in fields(value)})
    return value


@contextmanager
def _fake_world(config: RunConfig, rank: int, world_size: int) -> Iterator[ParallelContext]:
    """Be `rank` of a world that does not exist: torch's fake backend, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        # gloo would wait for ranks that do not exist.
        with model_axes(config.parallel, create_gloo_process_groups=False) as groups, _pretended_reads():
            yield ParallelContext(device=CPU, rank=rank, world_size=world_size, groups=groups, config=config.parallel)
    finally:
        dist.destroy_process_group()


@contextmanager
def _pretended_reads() -> Iterator[None]:
    """Objects from other ranks are this rank's own, and lists of numbers are ones: fake tensors have no contents."""

    def same_everywhere(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    with (
        patch.object(dist, "all_gather_object", same_everywhere),
        patch.object(FakeTensor, "tolist", lambda tensor: [1.0] * tensor.numel()),
    ):
        yield
