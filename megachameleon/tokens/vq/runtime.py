"""Processes, device and precision for training an image tokenizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group(threads: int | None = None) -> Iterator[torch.device]:
    """Join the group that torchrun prepared, if any, and yield this process's device.

    CUDA with NCCL when a GPU is there, otherwise the CPU with gloo.

    Args:
        threads: CPU threads of this process; by default what OMP_NUM_THREADS says (torchrun sets it to 1 if it is not
            set), and without it all cores, shared among this machine's processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        # affinity and not the machine's cores: a container or SLURM may allow fewer
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_processes))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        if distributed:
            dist.destroy_process_group()


def best_precision(device: torch.device) -> str:
    """`bf16` where matrix units for it exist, else `fp32`; asked here, because tokens do not import `parallel`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # other CPUs emulate bf16, which is slower than fp32
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
