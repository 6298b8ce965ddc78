"""What went wrong first, out of many logs: exit statuses, the line of the error, the earliest cause."""

import re
import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FINISHED = 0
FAILED = 1
BAD_INPUT = 2
STOPPED = 75
"""The trainer's exit status for: stopped on request, everything saved, the same command goes on."""

STOP_MARK = "stopped: "
TAIL_BYTES = 65_536
RANK_MARK = re.compile(r"^\[rank\d+\]: *")
"""What torch puts before the lines of an uncaught exception."""
ERROR = re.compile(r"^(error: .+|[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Failure|Exit)\b.*)$")
"""A line that names an error: the trainer's own form, or the end of a traceback."""
PEER_LOST = re.compile(
    r"connection (reset|closed|refused|was closed)|broken pipe|socket|connectFullMesh|gloo|nccl|tcpstore|"
    r"DistBackendError|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
"""How the ranks that lost a partner complain: consequences, not causes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One rank's end, as its node's launcher saw it, or the launcher's own."""

    rank: int | None
    """None: the launcher itself, which has started no rank."""
    host: str
    """Node, by its own name."""
    status: int
    """Exit status; 128 + n where signal n killed it."""
    line: str
    """The error in the rank's own words, or how it was killed."""
    log: str
    """Empty: there is none."""
    time: float
    """Seconds since the epoch, by the host's clock."""
    after_stop: bool = False
    """Whether the ranks of the node had been asked to stop before: then another node's failure is likely the cause."""

    def __str__(self) -> str:
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        log = f" (log: {self.log})" if self.log else ""
        return f"{who} on {self.host}, exit status {self.status}: {self.line}{log}"

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def exit_status(returncode: int) -> int:
    """A shell's exit status of subprocess's return code, which is negative for signals."""
    return returncode if returncode >= 0 else 128 - returncode


def failure_line(log: Path, status: int) -> str:
    """The last error that a rank wrote to its log, else what its exit status says.

    Args:
        log: the rank's stdout and stderr; it may be missing.
        status: as of `exit_status`.
    """
    # Who is killed cannot say why: an error in its log would be an older one.
    if status > 128:
        try:
            name = signal.Signals(status - 128).name
        except ValueError:
            name = f"signal {status - 128}"
        return f"killed by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
    for line in (RANK_MARK.sub("", line) for line in reversed(_tail(log))):
        if ERROR.match(line):
            return line.removeprefix("error: ")
    return f"no error in its log, exit status {status}"


def stop_reason(log: Path) -> str:
    """Why the trainer stopped, from the line it ends with, or empty."""
    return next((line.removeprefix(STOP_MARK) for line in reversed(_tail(log)) if line.startswith(STOP_MARK)), "")


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """The likeliest cause: the earliest that neither followed a stop nor only lost a partner; else the earliest."""
    ordered = sorted(failures, key=lambda failure: failure.time)
    causes = [failure for failure in ordered if not failure.after_stop]
    own = [failure for failure in causes if not PEER_LOST.search(failure.line)]
    return next(iter(own or causes or ordered), None)


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            # Logs of long runs are large, and the last error stands near the end.
            file.seek(max(log.stat().st_size - TAIL_BYTES, 0))
            return [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return []
