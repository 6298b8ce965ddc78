"""Layouts that our trainer accepts and that fit in memory, the fastest first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from megachameleon.config import ParallelConfig, RunConfig
from megachameleon.planning.cost import cost_of
from megachameleon.planning.estimate import Estimate, fullest_stage
from megachameleon.planning.hardware import Cluster
from megachameleon.planning.shapes import Layout, TransformerShape

LONG_SEQUENCE = 8_192
"""From here on sequences are worth being shared by context-parallel ranks; the configured number is always tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What was found."""

    tried: int
    """Layouts that the configuration accepts."""
    num_fitting: int
    """Those of them that fit in memory."""
    fitting: list[Estimate]
    """The fastest first; of layouts that differ in the number of chunks or the micro-batch, the fastest alone."""
    smallest: Estimate | None
    """The layout that needs least memory, for saying by how much nothing fits."""


def search(config: RunConfig, world_size: int, cluster: Cluster, advance: Callable[[], None] = lambda: None) -> Search:
    """Try layouts of a model on so many GPUs; batch, sequence length and kernels stay as configured.

    Args:
        advance: called after each layout tried.
    """
    shape = TransformerShape.from_model(config.model, config.data.sequence_length)
    fitting: list[Estimate] = []
    smallest: Estimate | None = None
    tried = 0
    for layout in layouts(config, world_size, cluster):
        tried += 1
        found = Estimate(
            shape=shape,
            layout=layout,
            cluster=cluster,
            memory=fullest_stage(shape, layout),
            time=cost_of(shape, layout, cluster),
        )
        if found.fits:
            fitting.append(found)
        if smallest is None or found.total_gib < smallest.total_gib:
            smallest = found
        advance()
    # Of layouts that are equally fast, the one that needs less memory.
    fitting.sort(key=lambda found: (found.time.total, found.total_gib))
    different: dict[tuple[object, ...], Estimate] = {}
    for found in fitting:
        different.setdefault(_kind(found.layout), found)
    return Search(tried=tried, num_fitting=len(fitting), fitting=list(different.values()), smallest=smallest)


def _kind(layout: Layout) -> tuple[object, ...]:
    """What makes layouts different to a reader."""
    axes = (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel)
    return (*axes, layout.recompute, layout.recompute_modules)


def layouts(config: RunConfig, world_size: int, cluster: Cluster) -> Iterator[Layout]:
    """Every layout to try that the configuration's own checks accept."""
    for parallel, micro_batch in product(_parallels(config, cluster), (1, 2, 4, 8)):
        training = replace(config.training, micro_batch_size=micro_batch)
        candidate = replace(config, parallel=parallel, training=training)
        try:
            candidate.validate()
            yield Layout.from_run(candidate, world_size)
        except ValueError:
            continue


def _parallels(config: RunConfig, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Axes that may divide the model; tensor-parallel ranks stay within a node."""
    layers = config.model.num_layers
    tensors = [n for n in (1, 2, 4, 8, 16) if n <= cluster.gpus_per_node]
    pipelines = [n for n in range(1, min(layers, 64) + 1) if layers % n == 0]
    contexts = {1, config.parallel.context_parallel}
    if config.data.sequence_length > LONG_SEQUENCE:
        contexts |= {2, 4, 8, 16}
    recomputes: list[tuple[str, tuple[str, ...]]] = [("none", ("mlp",)), ("selective", ("mlp",)), ("full", ("mlp",))]
    if config.model.norm_order == "pre":
        recomputes.insert(1, ("selective", ("layernorm",)))
    for tensor, pipeline, context in product(tensors, pipelines, sorted(contexts)):
        chunks = [n for n in range(1, layers // pipeline + 1) if layers // pipeline % n == 0] if pipeline > 1 else [1]
        for virtual, (recompute, modules) in product(chunks, recomputes):
            yield ParallelConfig(
                tensor_parallel=tensor,
                pipeline_parallel=pipeline,
                virtual_pipeline_parallel=virtual,
                context_parallel=context,
                # Never without: it moves as many bytes and keeps fewer.
                sequence_parallel=tensor > 1,
                distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                recompute=recompute,  # type: ignore[arg-type]
                recompute_modules=modules,  # type: ignore[arg-type]
            )
