"""The processes of one node: started, signalled, and ended so that none stays behind."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """A started process."""

    rank: int
    """Among all of the job."""
    process: subprocess.Popen
    log: Path
    """Its stdout and stderr."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None


def start_rank(
    command: Sequence[str], environment: Mapping[str, str], *, rank: int, local_rank: int, log: Path
) -> Rank:
    """Start one rank in a session of its own, with its output appended to `log`.

    The kernel kills it when the launcher dies, so that a crashed launcher leaves no process on a GPU.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank), "PYTHONUNBUFFERED": "1"}
    # Looked up here: in the child, between fork and exec, hardly anything is safe to do.
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_the_launcher() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the kernel knew
            os._exit(1)

    with log.open("ab") as file:
        process = subprocess.Popen(
            list(command),
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # makes a process group, which is killed whole with its data workers
            preexec_fn=die_with_the_launcher,  # noqa: PLW1509  (the launcher has one thread)
        )
    return Rank(rank=rank, process=process, log=log)


def send(ranks: Sequence[Rank], number: signal.Signals) -> None:
    """Signal the ranks that live, not their helpers: those are the rank's own business."""
    for rank in ranks:
        if rank.alive:
            rank.process.send_signal(number)


def end(ranks: Sequence[Rank], *, grace: float, patience: float = 30.0) -> list[Rank]:
    """Terminate what lives, kill what stays, data workers included; returns what even SIGKILL could not end.

    Args:
        grace: seconds between SIGTERM and SIGKILL.
        patience: seconds to wait for the kernel afterwards; a process in uninterruptible sleep, on a dead file
            system, is left to SLURM, which drains the node.
    """
    send(ranks, signal.SIGTERM)
    _wait(ranks, grace)
    for rank in ranks:
        try:
            os.killpg(rank.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    _wait(ranks, patience)
    return [rank for rank in ranks if rank.alive]


def _wait(ranks: Sequence[Rank], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and any(rank.alive for rank in ranks):
        time.sleep(0.05)
