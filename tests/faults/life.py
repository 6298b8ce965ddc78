"""One life of a run: every rank a process of its own, forked from a parent that has imported torch once."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported for the fork server, which imports this module once; see `warm_context`.
import megachameleon.checkpoint.saving
import megachameleon.model.decoder
import megachameleon.planning.dry_run
import megachameleon.training.batches
import megachameleon.training.callbacks.build
import megachameleon.training.checkpointing
import megachameleon.training.trainer  # noqa: F401
from megachameleon.training.run import train  # noqa: F401

TRAIN = Path(__file__).parents[2] / "tools/train.py"


@dataclass(frozen=True, kw_only=True)
class Life:
    """How one life ended."""

    statuses: tuple[int, ...]
    """Exit status by rank; negative: the signal that ended it."""
    seconds: float
    seconds_after_first_death: float
    """From the first rank's end to the last one's."""
    hung: tuple[int, ...]
    """Ranks that had to be killed because they did not end by themselves."""
    log: str


def warm_context() -> Any:
    """A fork server that has imported all that a rank needs, so that a life takes a second and not ten."""
    # Python 3.11's fork server looks for what it should preload on its own path, not on this process's.
    folders = [str(Path(__file__).parent), str(TRAIN.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; threads would not survive the fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["life"])
    return context


def live(context: Any, config: Path, world_size: int, fault: Any, folder: Path, patience: float) -> Life:
    """Run the trainer in `world_size` processes until all have ended.

    Args:
        fault: a `Fault`, or None for an undisturbed life.
        folder: of the run, beside which the ranks' logs are written.
        patience: seconds that ranks may outlive the first that died.
    """
    port = _free_port()
    logs = [folder.parent / f"rank_{rank}.log" for rank in range(world_size)]
    start = time.monotonic()
    processes = [
        context.Process(target=_be_rank, args=(rank, world_size, port, str(config), fault, str(folder), str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    first_death, hung = _wait(processes, patience)
    end = time.monotonic()
    statuses = tuple(process.exitcode for process in processes)
    for process in processes:
        process.close()
    return Life(
        statuses=statuses,
        seconds=end - start,
        seconds_after_first_death=end - first_death,
        hung=hung,
        log="".join(f"[{log.stem}] {line}\n" for log in logs for line in _lines(log)),
    )


def _wait(processes: list[Any], patience: float) -> tuple[float, tuple[int, ...]]:
    """Until all have ended; after a failure, those that remain have `patience` seconds. A stopped one is never waited
    for longer than the others need to notice."""
    from multiprocessing.connection import wait

    alive, first_death, hung = list(processes), 0.0, []
    while alive:
        ended = wait([process.sentinel for process in alive], timeout=1.0)
        alive = [process for process in alive if process.sentinel not in ended]
        now = time.monotonic()
        if ended and not first_death:
            first_death = now
        if alive and first_death and now - first_death > patience:
            hung = [processes.index(process) for process in alive]
            for process in alive:
                process.kill()
            for process in alive:
                process.join()
            alive = []
    for process in processes:
        process.join()
    return first_death, tuple(hung)


def _be_rank(rank: int, world_size: int, port: int, config: str, fault: Any, folder: str, log: str) -> None:
    """What the forked process does: become rank `rank`, arm the fault, run tools/train.py."""
    from faults import arm

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if fault is not None and fault.rank == rank:
        arm(fault, Path(folder))
    sys.argv = [str(TRAIN), config]
    runpy.run_path(str(TRAIN), run_name="__main__")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
