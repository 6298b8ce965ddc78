"""Run a command and watch it: wall time and the memory of all its processes together."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_TO_STOP = 20.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended; `interrupted` when it was stopped from the keyboard or by a signal."""

    status: int
    seconds: float
    peak_memory_mb: float
    interrupted: bool = False


def run_command(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Outcome:
    """Run `command` in `folder` on this terminal, so that its progress bars show, and wait for it.

    An interruption reaches the command too; it gets time to end, and is then killed with its children.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=folder)
    sampler = MemorySampler(process.pid)
    sampler.start()
    interrupted = False
    try:
        status = process.wait()
    except KeyboardInterrupt:
        interrupted = True
        status = stop(process)
    finally:
        sampler.stop()
    seconds = time.monotonic() - started
    interrupted = interrupted or status in (-signal.SIGINT, 128 + signal.SIGINT)
    return Outcome(status=status, seconds=seconds, peak_memory_mb=sampler.peak / 2**20, interrupted=interrupted)


def stop(process: subprocess.Popen) -> int:
    """Ask a process to end, wait, and kill it and its children if it does not."""
    family = [process.pid, *(child.pid for child in children_of(process.pid))]
    process.terminate()
    try:
        return process.wait(timeout=SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return process.wait()


def children_of(pid: int) -> list[psutil.Process]:
    """All descendants of a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


class MemorySampler(threading.Thread):
    """Samples the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample twice a second."""
        while not self._stopped.wait(SECONDS_BETWEEN_SAMPLES):
            with suppress(psutil.Error):
                family = [psutil.Process(self._pid), *children_of(self._pid)]
                self.peak = max(self.peak, sum(memory_of(process) for process in family))

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


def memory_of(process: psutil.Process) -> int:
    """Bytes of one process; memory that processes share counts once over all of them."""
    try:
        return process.memory_full_info().pss
    except (psutil.Error, AttributeError):
        return 0
