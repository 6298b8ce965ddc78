"""Which process of a run this one is, from the variables that launchers set."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_RESERVED_STEP = 2**32 - 256
"""SLURM numbers batch shells, interactive shells and the like from the top; ranks never run as such a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process among those of the run."""

    rank: int = 0
    """Among all, from 0."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Its number on this machine, by which it takes its GPU."""


def own_place(environment: Mapping[str, str] = os.environ) -> Place:
    """RANK, WORLD_SIZE and LOCAL_RANK if they are set; else those of a SLURM step of several tasks; else one process.

    In the batch shell of a job, SLURM_NTASKS and SLURM_PROCID are set although nothing was started: only a step counts.

    Raises:
        ValueError: the variables contradict each other, some are missing, or nothing says where the processes meet.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        # Explicit ones win: torchrun inside a SLURM step sets them for its own processes.
        place = _explicit(environment)
    elif _step_tasks(environment) > 1:
        place = _of_slurm(environment)
    else:
        return Place()
    if place.world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ValueError(
                    f"{name}: missing, though there are {place.world_size} processes; start them with torchrun, or "
                    "set MASTER_ADDR and MASTER_PORT to the host and a free port of rank 0"
                )
    return place


def _explicit(environment: Mapping[str, str]) -> Place:
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    local_rank = _number(environment, "LOCAL_RANK", 0) if world_size > 1 or "LOCAL_RANK" in environment else 0
    if rank >= world_size:
        raise ValueError(f"RANK: {rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
    return Place(rank=rank, world_size=world_size, local_rank=local_rank)


def _step_tasks(environment: Mapping[str, str]) -> int:
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= FIRST_RESERVED_STEP:
        return 0
    return _number(environment, "SLURM_NTASKS", 1) if "SLURM_NTASKS" in environment else 0


def _of_slurm(environment: Mapping[str, str]) -> Place:
    world_size = _step_tasks(environment)
    rank = _number(environment, "SLURM_PROCID", 0)
    of_step = environment.get("SLURM_STEP_NUM_TASKS", str(world_size))
    if of_step != str(world_size) or rank >= world_size:
        raise ValueError(
            f"SLURM_NTASKS: {world_size} does not fit SLURM_STEP_NUM_TASKS={of_step} and SLURM_PROCID={rank}; start "
            "the processes by srun without changing its variables, or set RANK, WORLD_SIZE and LOCAL_RANK"
        )
    local_rank = _number(environment, "SLURM_LOCALID", 0)
    return Place(rank=rank, world_size=world_size, local_rank=local_rank)


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name}: missing; set RANK, WORLD_SIZE and LOCAL_RANK, or none of them")
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name}: {text!r} must be a whole number, {least} or more")
    return int(text)
