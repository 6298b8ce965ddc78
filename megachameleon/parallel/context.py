"""The processes of a run and their place on each parallel axis."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megachameleon.config import ParallelConfig
from megachameleon.parallel.device import communication_backend, install, pick_device


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This process's device, its ranks and its process groups."""

    device: torch.device
    rank: int
    world_size: int
    groups: Any
    """megatron-core's ProcessGroupCollection."""
    config: ParallelConfig

    @property
    def tensor_rank(self) -> int:
        """Place on the tensor-parallel axis."""
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        """Place on the pipeline-parallel axis."""
        return self.groups.pp.rank()

    @property
    def context_rank(self) -> int:
        """Place on the context-parallel axis: which part of each sequence is here."""
        return self.groups.cp.rank()

    @property
    def data_rank(self) -> int:
        """Place on the data-parallel axis: which samples are read here."""
        return self.groups.dp.rank()

    @property
    def data_parallel(self) -> int:
        """Number of groups of devices that read different samples."""
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the head and sees the loss (in the last of its chunks)."""
        return self.pipeline_rank == self.config.pipeline_parallel - 1

    @property
    def is_main(self) -> bool:
        """Whether this process talks to the terminal and writes shared files."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage in this process's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.config.pipeline_parallel - 1)

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier()


@contextlib.contextmanager
def parallel_context(config: ParallelConfig, *, timeout_seconds: int = 1800) -> Iterator[ParallelContext]:
    """Join the processes that torchrun started (or run alone) and lay the parallel axes over them.

    Raises:
        ValueError: the layout does not divide the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.data_parallel(world_size)
    device = pick_device()
    install(device)
    _init_process_group(device, world_size, timeout_seconds)
    try:
        with model_axes(config) as groups:
            yield ParallelContext(
                device=device, rank=dist.get_rank(), world_size=world_size, groups=groups, config=config
            )
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_axes(config: ParallelConfig, **arguments: Any) -> Iterator[Any]:
    """Lay the axes over the processes of an initialized world; yields megatron-core's ProcessGroupCollection.

    Args:
        arguments: more of megatron-core's `initialize_model_parallel`.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    chunks = config.virtual_pipeline_parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=config.context_parallel,
        **arguments,
    )
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def _init_process_group(device: torch.device, world_size: int, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    backend = communication_backend(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=world_size, timeout=timeout)
