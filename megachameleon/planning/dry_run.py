"""A run of any size checked and counted on one machine: every model part is built, on no device, in a fake world."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megachameleon.config import KernelsConfig, RunConfig
from megachameleon.files import require_usable_folder
from megachameleon.parallel.context import model_axes
from megachameleon.parallel.device import install, pick_device


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCount:
    """Parameters of one rank of a pipeline stage; the same on every tensor-parallel rank of it."""

    stage: int
    layers: int
    parameters: int


def dry_run(config: RunConfig, world_size: int | None) -> str:
    """Check a configuration for a world and say what it needs, as text.

    Args:
        world_size: processes to assume; None takes torchrun's, or as few as the layout allows.

    Raises:
        ValueError: whatever would stop the real run.
    """
    if world_size is not None and world_size < 1:
        raise ValueError(f"--world-size: {world_size} must be at least 1")
    start = time.perf_counter()
    world = world_size or max(int(os.environ.get("WORLD_SIZE", "1")), config.parallel.model_parallel)
    config.validate_world(world)
    require_usable_folder(Path(config.output_dir))
    install(pick_device())
    from megachameleon.training.trainer import resolve_precision

    config = resolve_precision(config, pick_device())
    data = [*_describe_data(config), *_describe_resume(config)]
    stages = count_stages(config, world)
    lines = [*_describe_run(config, world), *_describe_stages(config, world, stages), *data]
    return "\n".join(
        [*lines, f"checked in       {time.perf_counter() - start:.1f} s; nothing was allocated or trained"]
    )


def count_stages(config: RunConfig, world_size: int) -> list[StageCount]:
    """Build each pipeline stage without memory and count its parameters."""
    ranks_per_stage = world_size // config.parallel.pipeline_parallel
    return [
        _count_stage(config, world_size, stage, stage * ranks_per_stage)
        for stage in range(config.parallel.pipeline_parallel)
    ]


def _count_stage(config: RunConfig, world_size: int, stage: int, rank: int) -> StageCount:
    with _fake_world(config, rank, world_size) as groups:
        from megachameleon.model.decoder import build_chunks
        from megachameleon.model.kernels.table import choose_kernels

        dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
        choose_kernels(config.kernels)  # refuses what cannot run here
        kernels = choose_kernels(KernelsConfig())  # counts are the same with all
        with torch.device("meta"):
            chunks = build_chunks(config.model, config.parallel, kernels, groups, dtype=dtype, seed=None)
        return StageCount(
            stage=stage,
            layers=sum(len(chunk.decoder.layers) for chunk in chunks),
            parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        )


@contextmanager
def _fake_world(config: RunConfig, rank: int, world_size: int) -> Iterator[Any]:
    """Be `rank` of a world that does not exist: torch's fake backend, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with model_axes(config.parallel, create_gloo_process_groups=False) as groups:
            yield groups
    finally:
        dist.destroy_process_group()


def _describe_run(config: RunConfig, world: int) -> list[str]:
    parallel, training = config.parallel, config.training
    data_parallel = parallel.data_parallel(world)
    tokens = training.global_batch_size * config.data.sequence_length
    return [
        f"parameters       {config.model.num_parameters:,}",
        f"processes        {world:,}: {parallel.describe(world)}",
        f"global batch     {training.global_batch_size:,} samples = {tokens:,} tokens: "
        f"{training.num_micro_batches(data_parallel)} micro-batches of {training.micro_batch_size} on each rank",
        f"run              {training.num_steps:,} steps = {tokens * training.num_steps:,} tokens",
        f"precision        {config.training.precision}",
    ]


def _describe_stages(config: RunConfig, world: int, stages: list[StageCount]) -> list[str]:
    data_parallel = config.parallel.data_parallel(world)
    replicas = data_parallel * config.parallel.context_parallel
    shards = replicas if config.parallel.distributed_optimizer else 1
    fp32 = config.training.precision == "fp32"
    lines = []
    for stage in stages:
        moments, master = 8 / shards, 0 if fp32 else 4 / shards
        size = stage.parameters * ((4 if fp32 else 2) + 4 + master + moments)
        lines.append(
            f"stage {stage.stage:<10} {stage.layers} layers, {stage.parameters:,} parameters a rank, "
            f"{size / 1e9:,.2f} GB of weights, gradients and optimizer (activations come on top)"
        )
    return lines


def _describe_data(config: RunConfig) -> list[str]:
    if not config.data.train:
        return ["data             none configured: data.train, data.stages and data.tokenizer are needed to train"]
    from megachameleon.training.batches import open_data, require_enough_samples
    from megachameleon.training.trainer import require_vocabulary_size

    data = open_data(config.data, config.training)
    require_vocabulary_size(config, data.vocabulary.size)
    require_enough_samples(data, config.training, done=0, consumed=0)
    if config.logging.drawing.prompts:
        from megachameleon.training.callbacks.drawing import Drawing

        Drawing(config)  # refuses what cannot be drawn
    drawn = data.train.drawn_before(config.training.num_steps * config.training.global_batch_size)
    return [
        f"data             {name}: {packed.summary.tokens:,} tokens in {len(packed):,} samples "
        f"({packed.fill_rate:.1%} filled), {drawn.get(name, 0) / len(packed):.2f} epochs"
        for name, packed in data.datasets.items()
    ]


def _describe_resume(config: RunConfig) -> list[str]:
    from megachameleon.checkpoint.folder import complete_checkpoints
    from megachameleon.training.checkpointing import CHECKPOINT_FOLDER
    from megachameleon.training.trainer import require_resumable

    found = complete_checkpoints(Path(config.output_dir) / CHECKPOINT_FOLDER)
    if not found:
        return []
    require_resumable(found[-1], config)
    return [f"resume           from {found[-1]}; that its samples are the same is checked when the run starts"]
