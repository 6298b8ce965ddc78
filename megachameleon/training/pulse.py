"""What this process is doing: noted by the loop, written down for others by a thread, which also ends a hung process.

The loop only sets attributes; files are the thread's work. Python threads run while the main thread waits in a
collective, so a process can say where it hangs, and end itself, although its main thread cannot.
"""

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["starting", "training", "validating", "saving", "loading", "stopping", "finished", "stopped", "failed"]
HEARTBEAT_FILE = "heartbeat.json"
"""Of the whole run, by the main process."""
PULSE_FOLDER = "heartbeats"
"""Of each rank."""
HEARTBEAT_SECONDS = 1.0
PULSE_SECONDS = 5.0
SUSPENDED_SECONDS = 10.0
"""A thread that slept so much longer than it wanted was suspended with its process, which is no hang."""
LEAVE_SECONDS = 30.0
"""For what is left to do after a failure: closing groups, which may hang, and files."""
SLOW_STATES = ("starting", "validating", "saving", "loading", "stopping")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A process of the run, and where it is."""

    rank: int
    host: str
    """Name of its machine."""
    pid: int
    """Process number there."""
    stage: int = 0
    """Of the pipeline; processes of one stage have the same work."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Pulse:
    """Notes of one process. Without `watch` they are only kept."""

    def __init__(self, *, rank: int = 0, hang_timeout: float = 600.0, start_timeout: float = 1_800.0) -> None:
        """Args: seconds without progress, in steps and in slow states, after which the process counts as hung."""
        self.me = Peer(rank=rank, host=socket.gethostname(), pid=os.getpid())
        self.state: State = "starting"
        self.step = 0
        self.facts: dict[str, Any] = {}
        """More for the run's heartbeat, such as the number of steps."""
        self.folder: Path | None = None
        """The run's; files are written once it is known to be ours."""
        self._limits = {"slow": start_timeout, "fast": hang_timeout, "failed": min(LEAVE_SECONDS, start_timeout)}
        self._progress_at = time.monotonic()
        self._beats = 0
        self._allowed = start_timeout
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, state: State) -> None:
        """Something else begins."""
        self.state = state
        self.beat()

    def beat(self, step: int | None = None, **facts: Any) -> None:
        """There is progress: here, and if a step is given, a whole step."""
        self.step = self.step if step is None else step
        self.facts.update(facts)
        slow = self.state in SLOW_STATES or self.step == self.facts.get("first_step")  # the first step compiles
        self._allowed = self._limits["failed" if self.state == "failed" else "slow" if slow else "fast"]
        self._progress_at = time.monotonic()
        self._beats += 1

    def stalled_for(self) -> float:
        """Seconds since the last progress, as far as they are too many; else 0."""
        idle = time.monotonic() - self._progress_at
        return idle if idle > self._allowed else 0.0

    def watch(self, on_hang: Callable[[float], None]) -> None:
        """Start the thread.

        Args:
            on_hang: called in it, with the seconds since the last progress, when they are too many; should not return.
        """
        self._thread = threading.Thread(target=self._run, args=(on_hang,), name="pulse", daemon=True)
        self._thread.start()

    def publish(self, folder: Path) -> None:
        """From now on write files, since this process's run has the folder for itself."""
        self.folder = folder
        (folder / PULSE_FOLDER).mkdir(parents=True, exist_ok=True)
        self._write_all()

    def close(self, state: State, **facts: Any) -> None:
        """Stop watching, with a last word."""
        self.facts.update(facts)
        self.enter(state)
        self._closing.set()
        # It may be that thread that closes, and a thread cannot wait for itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._write_all()

    def _run(self, on_hang: Callable[[float], None]) -> None:
        period = min(HEARTBEAT_SECONDS, min(self._limits.values()) / 10)
        written, written_at, woke_at = -1, 0.0, time.monotonic()
        while not self._closing.wait(period):
            now = time.monotonic()
            if now - woke_at > period + SUSPENDED_SECONDS:
                # The clock went on, the process did not: that time is no lack of progress.
                self._progress_at += now - woke_at
            woke_at = now
            if seconds := self.stalled_for():
                on_hang(seconds)
            if self.me.rank == 0 and self._beats != written and self.folder:
                written = self._beats
                self._write_heartbeat(self.folder)
            if now - written_at >= PULSE_SECONDS and self.folder:
                written_at = now
                self._write_pulse(self.folder)

    def _write_all(self) -> None:
        if self.folder:
            self._write_pulse(self.folder)
            if self.me.rank == 0:
                self._write_heartbeat(self.folder)

    def _content(self) -> dict[str, Any]:
        idle = time.monotonic() - self._progress_at
        # JSON knows neither NaN nor infinity, and who watches from outside may read it strictly.
        unreal = [name for name, value in self.facts.items() if isinstance(value, float) and not math.isfinite(value)]
        return {
            # Of the last progress, not of writing: a loop that is stuck must not look alive.
            "time": round(time.time() - idle, 3),
            "state": self.state,
            "step": self.step,
            **self.facts,
            **dict.fromkeys(unreal),
            "rank": self.me.rank,
            "host": self.me.host,
            "pid": self.me.pid,
            "job": os.environ.get("SLURM_JOB_ID"),
        }

    def _write_heartbeat(self, folder: Path) -> None:
        """Renamed into place, so that readers see it whole; not flushed, since it is about this moment only."""
        temporary = folder / f".{HEARTBEAT_FILE}.{self.me.host}.{self.me.pid}.tmp"
        try:
            temporary.write_text(json.dumps(self._content()) + "\n", encoding="utf-8")
            temporary.replace(folder / HEARTBEAT_FILE)
        except OSError as error:
            self._complain(error)

    def _write_pulse(self, folder: Path) -> None:
        """In place: thousands of ranks would make the file system rename thousands of files."""
        try:
            # A file, not a key in torch's store, which dies with the process that holds it.
            with pulse_path(folder, self.me.rank).open("w", encoding="utf-8") as file:
                file.write(json.dumps({**self._content(), "written": round(time.time(), 3)}) + "\n")
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """A full disk stops checkpoints, which say so; a heartbeat is no reason to stop."""
        if not self.facts.get("complained"):
            self.facts["complained"] = True
            print(f"{self.folder}: heartbeat cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def pulse_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its signs of life."""
    return folder / PULSE_FOLDER / f"rank-{rank:05d}.json"
