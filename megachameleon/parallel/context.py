"""The processes of a run and their place on each parallel axis."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megachameleon.config import ParallelConfig
from megachameleon.parallel.device import communication_backend, install, pick_device
from megachameleon.ranks import Place, own_place


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This process's device, its ranks and its process groups."""

    device: torch.device
    """Where its tensors live: its GPU, or the CPU."""
    rank: int
    """Global, from 0."""
    world_size: int
    """Processes of the run."""
    groups: Any
    """megatron-core's ProcessGroupCollection."""
    config: ParallelConfig
    """Sizes of the axes; the data-parallel one is in `data_parallel`."""

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
def parallel_context(
    config: ParallelConfig, *, timeout_seconds: int = 1800, traces: Path | None = None
) -> Iterator[ParallelContext]:
    """Join the processes that a launcher started (or run alone) and lay the parallel axes over them.

    Args:
        timeout_seconds: for all to come, and for a collective. It cannot be shortened later, so it must allow for the
            slowest start; a run's watchdog is quicker.
        traces: folder in which NCCL leaves its newest collectives when one of them times out; None: nowhere.

    Raises:
        ValueError: the layout does not divide the number of processes, or the environment contradicts itself.
    """
    place = own_place()
    # Only for its check: what cannot fit must fail before a process waits for the others.
    config.data_parallel(place.world_size)
    device = pick_device(place.local_rank)
    install(device)
    if traces is not None and device.type == "cuda":
        # Before any group exists: NCCL's groups read these variables when they are made.
        _record_collectives(traces)
    _init_process_group(device, place, timeout_seconds)
    try:
        with model_axes(config) as groups:
            yield ParallelContext(
                device=device, rank=place.rank, world_size=place.world_size, groups=groups, config=config
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
        # Any number, even 1, means the interleaved schedule to megatron-core, which then wants a pipeline.
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=config.context_parallel,
        **arguments,
    )
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def _record_collectives(folder: Path) -> None:
    """Switch on torch's flight recorder, and have a broken communicator end the process; what is set already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl-rank-"),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _init_process_group(device: torch.device, place: Place, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    backend = communication_backend(device)
    own, world = place.rank, place.world_size
    if world > 1:
        dist.init_process_group(backend, init_method="env://", rank=own, world_size=world, timeout=timeout)
    else:
        # Alone: a store inside the process needs no port, so runs on one machine cannot meet by accident.
        dist.init_process_group(backend, store=dist.HashStore(), rank=own, world_size=world, timeout=timeout)
