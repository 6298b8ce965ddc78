"""Worker processes that are started when first needed and then run many distributed cases over gloo."""

import gc
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

CASE_TIMEOUT = 200


class WorkerPool:
    """`run(n, function, *args)` calls a module-level function in n processes that can form a gloo group."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._jobs: list[Any] = []
        self._processes: list[Any] = []
        self._results = self._context.Queue()

    def _grow(self, size: int) -> None:
        for rank in range(len(self._processes), size):
            jobs = self._context.Queue()
            process = self._context.Process(target=_serve, args=(rank, jobs, self._results), daemon=True)
            process.start()
            self._jobs.append(jobs)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank.

        Raises:
            AssertionError: a rank raised; carries its traceback. All workers are then replaced, since the other ranks
                may wait for it for ever.
        """
        self._grow(world_size)
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
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = result
        return results

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.kill()
            process.join()
        self._jobs, self._processes, self._results = [], [], self._context.Queue()


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
        # What refers to itself keeps its process groups, whose threads spin on connections that others have closed.
        gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
