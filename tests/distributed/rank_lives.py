"""Real processes that run tools/train.py, some of which misbehave; forked from a server that has imported torch."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[2] / "tools/train.py"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks of a run ended."""

    statuses: list[int]
    logs: list[str]
    seconds: float
    """From the misbehaviour's file, or from the start, to the end of the last rank."""


def fork_server() -> Any:
    """A context whose processes start in a moment."""
    context = multiprocessing.get_context("forkserver")
    folders = [str(Path(__file__).parent), str(TRAIN.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    context.set_forkserver_preload(["preloaded"])
    return context


def live(context: Any, config: Path, world_size: int, misbehave: Any = None, patience: float = 150.0) -> Ended:
    """Run all ranks to their end.

    Args:
        misbehave: called in each rank with its number and a file to touch when it strikes, before the tool runs; a
            function at the top of a module.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [config.with_name(f"{config.stem}_{rank}.log") for rank in range(world_size)]
    struck = config.with_name(f"{config.stem}_struck")
    arguments = [
        (rank, world_size, port, str(config), misbehave, str(struck), str(logs[rank])) for rank in range(world_size)
    ]
    processes = [context.Process(target=_be_rank, args=each) for each in arguments]
    start = time.time()
    for process in processes:
        process.start()
    limit = time.monotonic() + patience
    for process in processes:
        process.join(max(limit - time.monotonic(), 0.1))
    end = time.time()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    since = struck.stat().st_mtime if struck.exists() else start
    return Ended(
        statuses=[process.exitcode for process in processes],
        logs=[log.read_text(errors="replace") if log.exists() else "" for log in logs],
        seconds=end - since,
    )


def _be_rank(rank: int, world_size: int, port: int, config: str, misbehave: Any, struck: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if misbehave is not None:
        misbehave(rank, Path(struck))
    sys.argv = [str(TRAIN), config]
    runpy.run_path(str(TRAIN), run_name="__main__")
