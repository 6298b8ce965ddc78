"""When a run dies: each process writes down what it saw, and those that only lost a partner find out whose fault it is.

Records lie in `failures/LIFE/` of the run's folder, a file a rank; a life is one start of the run on all its ranks.
"""

import faulthandler
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch.distributed as dist

from megachameleon.console import FailureError, describe_error
from megachameleon.files import write_text
from megachameleon.parallel.context import ParallelContext
from megachameleon.training.pulse import PULSE_SECONDS, Peer, Pulse, pulse_path

FAILURE_FOLDER = "failures"
Kind = Literal["died", "hung", "lost"]
PATIENCE_SECONDS = 3 * PULSE_SECONDS
"""How long to look for the cause: until a process that is gone must have missed a sign of life."""
POLL_SECONDS = 0.1
OTHERS_SECONDS = 3.0
"""All ranks of a hung run notice within a step's length of rounding; wait so long for what they have to say."""
GONE = "died without a word (killed, or out of memory?)"
LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout")


class PeerFailedError(FailureError):
    """Another process failed, and this one with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a process saw at its end."""

    rank: int
    host: str
    pid: int
    kind: Kind
    """Of an error of its own, without progress, or for want of a partner."""
    step: int
    """Whole steps that it had done."""
    state: str
    """What it was doing; see `pulse.State`."""
    time: float
    """Seconds since 1970."""
    message: str
    """The error, or where it hung, in one line."""
    waiting: bool = False
    """Of a hung one: whether it was waiting for others."""

    @property
    def peer(self) -> Peer:
        """Who wrote it."""
        return Peer(rank=self.rank, host=self.host, pid=self.pid)


class PostMortem:
    """Records of one life of a run, by one of its processes. Until it has joined the others it keeps none."""

    def __init__(self, folder: Path, pulse: Pulse) -> None:
        self.folder, self.pulse = folder, pulse
        self.peers: Sequence[Peer] = ()
        self._records: Path | None = None
        self._told = ""

    def join(self, context: ParallelContext) -> None:
        """Agree on a name for this life, and on who takes part. Waits for all, so it comes when the folder is ours."""
        everybody: list[Any] = [None] * context.world_size
        life = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        dist.all_gather_object(everybody, (replace(self.pulse.me, stage=context.pipeline_rank), life))
        self.peers = [peer for peer, _ in everybody]
        self._records = self.folder / FAILURE_FOLDER / everybody[0][1]

    def explain(self, error: Exception) -> Exception:
        """What to tell of an error: it happened here, or it is another process's, which is found out within seconds.

        Errors of start-up that the user can mend, and what all ranks agree on, are everybody's and stay as they are.
        """
        told = self._explain(error)
        self._told = "".join(f"{note}: " for note in getattr(told, "__notes__", ())) + describe_error(told)
        # From here on the watching thread allows LEAVE_SECONDS, for closing groups may hang.
        self.pulse.enter("failed")
        return told

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, FailureError):
            return error
        if not lost_contact(error):
            self._write("died", describe_error(error))
            if len(self.peers) > 1 and not (isinstance(error, ValueError) and self.pulse.state == "starting"):
                error.add_note(f"{self.pulse.me} died {self._when()}")
            return error
        self._write("lost", describe_error(error))
        return PeerFailedError(self.find_cause() or f"{self.pulse.me} lost contact {self._when()}: {first_line(error)}")

    def end_hung(self, seconds: float) -> None:
        """Called by the watching thread: write down where the main thread is, find out who is behind, and end."""
        if self._told:  # it failed, and hangs on its way out
            self._end(self._told)
        where, waiting = whereabouts(main_thread_frame())
        doing = "waits" if waiting else "is"
        self._write("hung", f"{doing} in {where}", waiting=waiting)
        self._dump_stacks()
        cause = None
        if len(self.peers) > 1:
            time.sleep(OTHERS_SECONDS)
            cause = self.find_cause()
        text = cause or f"{self.pulse.me} {doing} in {where}"
        if waiting and not self.peers:
            text += ", before all have come"
        stacks = f" (stacks in {self._records})" if self._records else ""
        self._end(f"no progress for {seconds:.0f} s {self._when()}: {text}{stacks}")

    def _end(self, line: str) -> NoReturn:
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        self.pulse.close("failed", reason=line)
        # The main thread may be stuck in C++, where no exception reaches it.
        os._exit(1)

    def find_cause(self) -> str | None:
        """The likeliest cause in one line; waits for it as long as the guilty may still be silent."""
        started = time.monotonic()
        while True:
            records, waited = self.read(), time.monotonic() - started
            cause = guilty(records) or self._silent(records, waited)
            if cause or waited > PATIENCE_SECONDS or len(records) == len(self.peers):
                return cause or all_waiting(records)
            time.sleep(POLL_SECONDS)

    def read(self) -> list[Record]:
        """The records so far, in order of time."""
        records = []
        for path in self._records.glob("rank-*.json") if self._records else ():
            try:
                records.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return sorted(records, key=lambda record: record.time)

    def _silent(self, records: Sequence[Record], waited: float) -> str | None:
        """Name processes that left no record: gone, or without a sign of life."""
        spoke = {record.rank for record in records}
        for peer in self.peers:
            if peer.rank in spoke:
                continue
            # Process numbers mean nothing on another host.
            if peer.host == self.pulse.me.host and (gone := what_became_of(peer.pid)):
                return f"{peer} {gone}; this one is {self._when()}"
            if waited > PATIENCE_SECONDS - 1 and self._age(peer) > 2.2 * PULSE_SECONDS:
                return f"{peer} gives no sign of life {self._last_sign(peer)} (node dead, cut off, or process stopped?)"
        return None

    def _last_sign(self, peer: Peer) -> str:
        try:
            seen = json.loads(pulse_path(self.folder, peer.rank).read_text(encoding="utf-8"))
            return f"after step {seen['step']}, {seen['state']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "since its start"

    def _age(self, peer: Peer) -> float:
        """Seconds since a rank's last sign of life, by the file system's clock, which all nodes share."""
        try:
            own = pulse_path(self.folder, self.pulse.me.rank).stat().st_mtime
            return own - pulse_path(self.folder, peer.rank).stat().st_mtime
        except OSError:
            return float("inf")

    def _when(self) -> str:
        state = "" if self.pulse.state == "training" else f", {self.pulse.state}"
        return f"after step {self.pulse.step}{state}"

    def _write(self, kind: Kind, message: str, *, waiting: bool = False) -> None:
        if self._records is None:
            return
        me = self.pulse.me
        record = Record(
            rank=me.rank, host=me.host, pid=me.pid, kind=kind, step=self.pulse.step, state=self.pulse.state,
            time=time.time(), message=" ".join(message.split())[:2000], waiting=waiting,
        )  # fmt: skip
        try:
            write_text(self._records / f"rank-{me.rank:05d}.json", json.dumps(asdict(record)) + "\n")
        except OSError as error:
            print(f"{self._records}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def _dump_stacks(self) -> None:
        if self._records is None:
            return
        try:
            with (self._records / f"rank-{self.pulse.me.rank:05d}.stacks").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            return


def guilty(records: Sequence[Record]) -> str | None:
    """The first that died of an error of its own, else those of the hung that were not waiting for others."""
    for record in records:
        if record.kind == "died":
            return f"{record.peer} died after step {record.step}: {record.message}"
    busy = [record for record in records if record.kind == "hung" and not record.waiting]
    if busy:
        # Those further on wait for whoever is behind, whatever they were caught at.
        behind = min(record.step for record in busy)
        names = "; ".join(f"{record.peer} {record.message}" for record in busy if record.step == behind)
        return f"not finished with step {behind + 1}: {names}"
    return None


def all_waiting(records: Sequence[Record]) -> str | None:
    """What to say when everybody waits: the places differ, or the network is at fault."""
    hung = [record for record in records if record.kind == "hung"]
    if not hung:
        return None
    behind = min(record.step for record in hung)
    places: dict[str, list[str]] = {}
    for record in hung:
        if record.step == behind:
            places.setdefault(record.message, []).append(str(record.rank))
    shown = "; ".join(f"ranks {', '.join(ranks[:8])}{' ...' if ranks[8:] else ''} {at}" for at, ranks in places.items())
    return f"all wait for each other in step {behind + 1}: {shown}"


def lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another process has gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)


def first_line(error: BaseException) -> str:
    """The beginning of a library's message."""
    return str(error).strip().partition("\n")[0][:300]


def what_became_of(pid: int) -> str | None:
    """None if a process of this machine runs; one that has ended and is not yet collected does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # Before it stands the program's name in brackets, which may hold spaces and brackets itself.
        state = text.rpartition(")")[2].split()[0]
    except OSError:
        state = "X"
    return {"T": "was stopped by SIGSTOP", "Z": GONE, "X": GONE}.get(state)


def main_thread_frame() -> FrameType | None:
    """Where the main thread is now."""
    identity = threading.main_thread().ident
    return sys._current_frames().get(identity) if identity is not None else None


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, and whether it waits for others: its innermost function, and the innermost of this project.

    A wait shows as a frame of torch.distributed, or as a line with `.wait(`. On a GPU the host waits for its own device
    too, which may be waiting for others: there the answer says only which line does not come back.
    """
    innermost, ours, waiting = frame, frame, False
    while ours is not None and not any(package in _file(ours) for package in ("/megachameleon/", "/megatron/")):
        waiting = waiting or "/torch/distributed/" in _file(ours)
        ours = ours.f_back
    if innermost is None:
        return "an unknown place", False
    waiting = waiting or ".wait(" in linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    if ours is None or innermost is ours:
        return _spot(innermost), waiting
    return _spot(ours) if waiting else f"{_spot(innermost)}, called by {_spot(ours)}", waiting


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace(os.sep, "/")


def _spot(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({_file(frame).rpartition('/')[2]}:{frame.f_lineno})"
