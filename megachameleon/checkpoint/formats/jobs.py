"""Jobs on many bytes in threads, behind a progress bar; the first failure, or an interrupt, stops them all.

Threads are enough: hashing, reading and writing files, and torch's copies release the interpreter's lock.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from megachameleon.console import progress_bar

LOOK_EVERY = 0.25
"""Seconds between looks at how far the jobs are."""


class StoppedError(Exception):
    """Another job has failed, or somebody has asked for an end."""


class Meter:
    """Bytes that all jobs together have done, and the call to stop."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.failure: BaseException | None = None
        """Of the job that failed first."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def add(self, num_bytes: int) -> None:
        """Count what a job has done; called after every few MB, since jobs stop here.

        Raises:
            StoppedError: the job should end.
        """
        # Here and not in the loops of jobs: all count what they do, so all can be stopped.
        if self._stopped.is_set():
            raise StoppedError
        with self._lock:
            self.num_bytes += num_bytes

    def stop(self, failure: BaseException | None = None) -> None:
        """End all jobs at their next count."""
        with self._lock:
            self.failure = self.failure or failure
        self._stopped.set()


Job = Callable[[Meter], None]


def run_jobs(jobs: Sequence[Job], *, workers: int, what: str, num_bytes: int) -> None:
    """Do all jobs, begun in their order, and return when no thread is left.

    Args:
        what: said before the bar.
        num_bytes: what they will count.

    Raises:
        BaseException: the first that a job has raised, or one of this thread such as `KeyboardInterrupt`.
    """
    meter = Meter()
    with _one_core_each(), ThreadPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        futures = {pool.submit(_do, job, meter) for job in jobs}
        try:
            _watch(futures, meter, what, num_bytes)
        finally:
            meter.stop()
    if meter.failure is not None:
        raise meter.failure


def _do(job: Job, meter: Meter) -> None:
    """A job, unless one before it has failed."""
    try:
        meter.add(0)
        job(meter)
    except StoppedError:
        pass
    except BaseException as failure:
        meter.stop(failure)


def _watch(left: set[Future], meter: Meter, what: str, num_bytes: int) -> None:
    seen, start = 0, time.monotonic()
    with progress_bar(f"{what} (MB)", num_bytes // 1_000_000) as bar:
        while left:
            # With a timeout, so that Ctrl-C is seen while all jobs are busy.
            _, left = wait(left, timeout=LOOK_EVERY)
            now = meter.num_bytes // 1_000_000
            bar.advance(now - seen)
            bar.note(f"{now / max(time.monotonic() - start, LOOK_EVERY):,.0f} MB/s")
            seen = now


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Workers are the parallelism; torch's own threads below each of them would fight for the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
