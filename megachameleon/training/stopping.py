"""What asks a run to save and stop: a signal to any rank, the end of its time, a file. Agreed on by all ranks.

Light on purpose: tools/train.py listens to signals before it imports torch, which takes seconds.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOPPED = 75
"""Exit status of a run that was asked to stop and is to be continued by the same command (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 1.0
"""SLURM and torchrun may both deliver one request to a process; only a later repetition is impatience."""
STOP_FILE = "stop"
OUT_OF_TIME = 101
FILE_FOUND = 102
"""Codes for requests that are no signals; those have their own number."""


class StoppedError(BaseException):
    """The run ends with status 75. Not an Exception, so that no handler of errors takes it for one."""


class Listener:
    """Remembers the first signal that asked this process to stop."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 while there was none."""
        self.raises = True
        """Whether a signal ends the process at once: as long as it shares nothing with the others."""

    def handle(self, number: int, frame: Any) -> None:
        """The handler; runs in the main thread between two lines of Python.

        Raises:
            StoppedError: while `raises` is set.
        """
        self.received = self.received or number
        if self.raises:
            self.raises = False
            raise StoppedError(describe_stop(number))


@contextlib.contextmanager
def listen() -> Iterator[Listener]:
    """Take SIGTERM and SIGUSR1 as requests to save and stop; the same one again, a second later, ends the process.

    A handler waits until the main thread is back from C++, where it may be stuck in a collective. So a thread of its
    own reads the numbers that the interpreter writes into a pipe at once, and ends the process if one comes again.
    Outside the main thread of a program nothing is done.
    """
    listener = Listener()
    # Python lets no other thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    reading, writing = os.pipe()
    # set_wakeup_fd takes no other: a full pipe must not stop a signal handler.
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, listener.handle) for number in SIGNALS}
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_when_repeated, args=(reading,), name="signals", daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        signal.set_wakeup_fd(woken_before, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)
        # The reading thread finds the end of the pipe and returns.
        os.close(writing)
        thread.join()
        os.close(reading)


def ignore_requests() -> None:
    """From now on a request changes nothing: for the end of a program, whose exit status is settled.

    Python's shutdown can take seconds, in which SLURM's SIGTERM follows its SIGUSR1 when it pre-empts.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_when_repeated(pipe: int) -> None:
    first: dict[int, float] = {}
    while numbers := os.read(pipe, 16):
        for number in numbers:
            now = time.monotonic()
            if number in SIGNALS and now - first.setdefault(number, now) > SAME_REQUEST_SECONDS:
                # Not print: the main thread may be stuck while it holds the lock of stderr.
                os.write(2, f"second {signal.Signals(number).name}: ended at once, nothing saved\n".encode())
                os._exit(128 + number)


class TimeLimit:
    """How long the run may go on so that its last step and checkpoint still fit. For the main process."""

    MARGIN = 5.0
    """Seconds for what is not measured: shutting down, and clocks."""
    UNKNOWN_SAVE = 60.0
    """Seconds to set aside for a checkpoint as long as none has been timed; at most a tenth of the time."""

    def __init__(self, seconds: float | None, started: float | None = None) -> None:
        """Args: seconds in all (None: no limit), since when, in seconds since 1970 (None: the job's start, or now)."""
        self.seconds = seconds
        self.started = job_start() if started is None else started
        self._cycles: deque[float] = deque(maxlen=50)
        self._saves: deque[float] = deque(maxlen=5)
        self._last: float | None = None

    def stepped(self) -> None:
        """Note that a step has ended, to learn how long steps take with all that comes between them."""
        now = time.monotonic()
        if self._last is not None:
            self._cycles.append(now - self._last)
        self._last = now

    def rested(self) -> None:
        """Note that something long has ended that is no step and asks by itself whether to stop."""
        self._last = time.monotonic()

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took until it was durable."""
        self._saves.append(seconds)

    def reached(self) -> bool:
        """Whether another step and then a checkpoint might not fit any more."""
        if self.seconds is None:
            return False
        save = 1.5 * max(self._saves) if self._saves else min(self.UNKNOWN_SAVE, 0.1 * self.seconds)
        margin = min(self.MARGIN, 0.1 * self.seconds)
        return time.time() - self.started + max(self._cycles, default=0.0) + save + margin > self.seconds


def job_start() -> float:
    """When SLURM started this job, else now; seconds since 1970."""
    text = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(text) if text.isdigit() else time.time()


class StopFile:
    """The file `stop` in the output folder; what stands in it is the reason. For the main process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STOP_FILE

    def found(self) -> bool:
        """Whether it is there."""
        try:
            return self.path.exists()
        except OSError:  # a file server that does not answer for a moment asks for nothing; the next step looks again
            return False

    def obeyed(self) -> str:
        """Remove it, so that the next start does not stop again; returns the first line that stands in it."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.path.unlink(missing_ok=True)
        except OSError as error:
            print(f"{self.path}: cannot be removed ({error.strerror}); the next start will stop again", file=sys.stderr)
            return ""
        return lines[0].strip()[:200] if lines else ""


class StopRequests:
    """All that may ask this process to stop. Time and file are looked at by the main process alone, for all."""

    def __init__(self, folder: Path, *, is_main: bool, max_duration: float | None, listener: Listener) -> None:
        self.listener = listener
        # By one clock for all, or ranks would find at different steps that the time is up.
        self.limit = TimeLimit(max_duration if is_main else None)
        self.file = StopFile(folder)
        self._is_main = is_main

    def own(self) -> int:
        """The code of what asks this process to stop; 0: nothing."""
        if self.listener.received:
            return self.listener.received
        if not self._is_main:
            return 0
        if self.limit.reached():
            return OUT_OF_TIME
        return FILE_FOUND if self.file.found() else 0

    def obeyed(self, code: int) -> str:
        """Called when all is saved: the reason in words. A stop file is gone afterwards, whatever the reason was."""
        note = self.file.obeyed() if self._is_main and self.file.found() else ""
        return describe_stop(code) + (f" ({note})" if note else "")


def describe_stop(code: int) -> str:
    """A request in words."""
    if code == OUT_OF_TIME:
        return "faults.max_duration"
    if code == FILE_FOUND:
        return f"the file {STOP_FILE!r}"
    return signal.Signals(code).name
