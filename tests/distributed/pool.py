"""Worker processes that are started once and run many distributed cases over gloo."""

import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

CASE_TIMEOUT = 120


class WorkerPool:
    """`run(n, function, *args)` calls a module-level function in n processes that can form a gloo group."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._jobs = [context.Queue() for _ in range(self._size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, self._jobs[rank], self._results), daemon=True)
            for rank in range(self._size)
        ]
        for process in self._processes:
            process.start()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank.

        Raises:
            AssertionError: a rank raised; carries its traceback. The workers are then started anew, since the other
                ranks may wait for it for ever.
        """
        port = _free_port()
        for rank in range(world_size):
            self._jobs[rank].put((world_size, port, function, args))
        results: list[Any] = [None] * world_size
        for _ in range(world_size):
            try:
                rank, result, error = self._results.get(timeout=CASE_TIMEOUT)
            except queue.Empty:
                rank, result, error = -1, None, f"no answer within {CASE_TIMEOUT} s"
            if error:
                if world_size > 1:
                    self.close()
                    self._start()
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = result
        return results

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, jobs: Any, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        world_size, port, function, args = jobs.get()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        try:
            results.put((rank, function(*args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
