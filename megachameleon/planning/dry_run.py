"""A run of any size checked and counted on one machine: some of its ranks are trained for a step on fake tensors."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.files import require_usable_folder
from megachameleon.parallel.device import install, pick_device
from megachameleon.planning.counting import PARTS, Collective, Volume

GIGA = 1e9


def dry_run(config: RunConfig, world_size: int | None, rank: int | None = None) -> str:
    """Check a configuration for a world, count what some ranks hold and send, and say so as text.

    Args:
        world_size: processes to assume; None takes torchrun's, or as few as the layout allows.
        rank: the one to count; None counts the first of the first and of the last pipeline stage.

    Raises:
        ValueError: whatever would stop the real run; there is no such rank.
    """
    if world_size is not None and world_size < 1:
        raise ValueError(f"--world-size: {world_size} must be at least 1")
    start = time.perf_counter()
    world = world_size or max(int(os.environ.get("WORLD_SIZE", "1")), config.parallel.model_parallel)
    config.validate_world(world)
    if rank is not None and not 0 <= rank < world:
        raise ValueError(f"--rank: {rank} is not one of the {world:,} processes; take 0 to {world - 1}")
    require_usable_folder(Path(config.output_dir))
    install(pick_device())
    from megachameleon.model.kernels.table import choose_kernels
    from megachameleon.training.trainer import resolve_precision

    config = resolve_precision(config, pick_device())
    choose_kernels(config.kernels)  # refuses what cannot run here
    lines = [*_describe_run(config, world), *_describe_data(config), *_describe_resume(config)]
    ranks = _ends_of_the_pipeline(config, world) if rank is None else [rank]
    lines += [line for each in ranks for line in _describe_rank(config, each, world)]
    seconds = time.perf_counter() - start
    return "\n".join([*lines, f"checked in       {seconds:.1f} s; no memory was taken and nothing trained"])


def _ends_of_the_pipeline(config: RunConfig, world: int) -> list[int]:
    """Embedding and most micro-batches in flight are on the first stage, the head is on the last."""
    stages = config.parallel.pipeline_parallel
    # megatron-core numbers ranks with the pipeline outermost: a stage is a run of ranks.
    return sorted({0, (stages - 1) * (world // stages)})


def _describe_rank(config: RunConfig, rank: int, world: int) -> list[str]:
    from megachameleon.planning.fake_step import count_rank

    count = count_rank(config, rank, world)
    stages = config.parallel.pipeline_parallel
    memory = ", ".join(f"{part} {count.peak.get(part, 0) / GIGA:,.2f}" for part in PARTS)
    return [
        f"rank {rank:<11} stage {count.stage} of {stages}: {count.layers} layers, {count.parameters:,} parameters",
        f"  memory         {count.total / GIGA:,.2f} GB at the peak of a step: {memory}",
        f"  in a step      {'axis':<9} {'ranks':>6} {'message':<15} {'times':>9} {'GB in all':>10}",
        *_describe_traffic(sorted(count.traffic.items())),
    ]


def _describe_traffic(traffic: Sequence[tuple[Collective, Volume]]) -> list[str]:
    """A row for each kind of message; bytes are of whole tensors, whatever way a library takes to bring them about."""
    rows = [
        f"                 {kind.axis:<9} {kind.ranks:>6,} {kind.kind:<15} {volume.count:>9,} "
        f"{volume.bytes / GIGA:>10,.3f}"
        for kind, volume in traffic
    ]
    return rows or ["                 nothing: this process is alone"]


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
