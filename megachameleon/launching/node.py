"""The launcher of one node: `srun` starts one on each, and it starts the ranks.

It passes on requests to stop, keeps a log for each rank and shows rank 0's, ends all ranks soon after one has failed
or when the run's heartbeat stops, and leaves a record with every exit status and the first failure's own line.
Without SLURM it does the same on one machine.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachameleon.launching.failures import (
    BAD_INPUT,
    FAILED,
    FINISHED,
    STOPPED,
    Failure,
    exit_status,
    failure_line,
    first_failure,
    stop_reason,
)
from megachameleon.launching.ranks import Rank, end, send, start_rank
from megachameleon.launching.records import NodeRecord

POLL_SECONDS = 0.1
SETTLE_SECONDS = 2.0
"""After a first failure, others may end by their own errors, which say more than a signal."""
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL once a rank has failed: nothing can be saved any more without it."""
SAME_REQUEST_SECONDS = 5.0
"""SLURM may deliver one request several times: to the launcher, and through srun again."""
HUNG = 70
"""The status of a node whose run was ended for want of a heartbeat."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Requests to stop: SLURM's two, and a person's at the terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This node's place in the job and where its ranks meet."""

    node: int
    """Number of this node, from 0."""
    num_nodes: int
    """Of the job."""
    master_address: str
    """Host at which the ranks meet: the first node's."""
    master_port: int
    """Port there."""

    @staticmethod
    def of(environment: Mapping[str, str], master: str | None) -> "Place":
        """Inside a SLURM step, the step's; elsewhere one machine by itself, at a free port.

        Args:
            master: HOST:PORT; not taken from the environment, where a container's hooks may put another port.

        Raises:
            ValueError: a SLURM step without `master`, or with more than one launcher on a node.
        """
        if not environment.get("SLURM_STEP_ID", "").isdigit():
            return Place(node=0, num_nodes=1, master_address="127.0.0.1", master_port=free_port())
        address, _, port = (master or "").rpartition(":")
        if not address or not port.isdigit():
            raise ValueError(
                f"--master: {master or 'not given'}; inside a SLURM step it must be HOST:PORT of the first node, "
                "see examples/slurm/train.sbatch"
            )
        nodes = int(environment["SLURM_STEP_NUM_NODES"])
        if int(environment["SLURM_NTASKS"]) != nodes:
            raise ValueError(
                f"SLURM_NTASKS: srun started {environment['SLURM_NTASKS']} launchers on {nodes} nodes; "
                "give it --ntasks-per-node=1, for the launcher starts the ranks"
            )
        return Place(
            node=int(environment["SLURM_NODEID"]), num_nodes=nodes, master_address=address, master_port=int(port)
        )


class Heartbeat:
    """A file that must change; whether it still does, by this machine's clock alone."""

    def __init__(self, path: Path, *, start_within: float, stale_after: float) -> None:
        """Args: seconds until the first beat of this attempt, and between beats after it; 0 waits for ever."""
        self.path, self._start_within, self._stale_after = path, start_within, stale_after
        # A file that the life before has left must not look like a sign of this one.
        self._seen = self._stamp()
        self._since, self._beaten = time.monotonic(), False

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        # Each beat is a new file, renamed into place: its number changes even where times are coarse.
        return status.st_mtime_ns, status.st_ino

    def complaint(self) -> str | None:
        """None while it beats, else one line that names the last step."""
        stamp, now = self._stamp(), time.monotonic()
        if stamp is not None and stamp != self._seen:
            self._seen, self._since, self._beaten = stamp, now, True
        allowed = self._stale_after if self._beaten else self._start_within
        if not allowed or now - self._since <= allowed:
            return None
        last = f"after step {self._step()}" if self._beaten else "since the start"
        return f"no heartbeat for {now - self._since:.0f} s {last} ({self.path}): taken for hung, ended"

    def _step(self) -> str:
        try:
            return str(json.loads(self.path.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return "?"


class Launcher:
    """The ranks of this node, from start to record."""

    def __init__(self, command: Sequence[str], place: Place, ranks_per_node: int, logs: Path) -> None:
        self.place, self.logs, self.host = place, logs, socket.gethostname()
        self._requests: list[signal.Signals] = []
        self._first_request: dict[signal.Signals, float] = {}
        self._failures: list[Failure] = []
        self._shown = 0
        common = {
            **os.environ,
            # As torchrun does; else each rank takes all cores of the node.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "WORLD_SIZE": str(place.num_nodes * ranks_per_node),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": place.master_address,
            "MASTER_PORT": str(place.master_port),
        }
        # Before there are ranks, so that a request that comes while they start is not lost, nor ends the launcher.
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: self._requests.append(signal.Signals(number)))
        self.ranks = [
            start_rank(command, common, rank=rank, local_rank=local, log=logs / f"rank-{rank:05d}.log")
            for local, rank in enumerate(range(place.node * ranks_per_node, (place.node + 1) * ranks_per_node))
        ]

    def run(self, heartbeat: Heartbeat | None) -> NodeRecord:
        """Wait for the ranks, whatever becomes of them; nothing of them lives when this returns."""
        failed_at: float | None = None
        judged: set[int] = set()
        while any(rank.alive for rank in self.ranks):
            time.sleep(POLL_SECONDS)
            self._forward()
            self._show()
            self._collect(judged)
            if self._failures and failed_at is None:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > SETTLE_SECONDS:
                break
            complaint = heartbeat.complaint() if heartbeat else None
            if complaint:
                self._fail(self.ranks[0], HUNG, complaint)
                break
        self._collect(judged)
        # Even if all ranks have ended: their data workers may not have.
        stuck = end(self.ranks, grace=GRACE_SECONDS if any(rank.alive for rank in self.ranks) else 0.0)
        for rank in stuck:
            self._fail(rank, HUNG, f"process {rank.process.pid} cannot be killed (stuck in the kernel)")
        self._show()
        return NodeRecord(
            node=self.place.node,
            host=self.host,
            statuses=self._statuses(),
            failures=self._failures,
            stopped_by=self._stopped_by(),
        )

    def _collect(self, judged: set[int]) -> None:
        for rank in self.ranks:
            if rank.rank in judged or rank.alive:
                continue
            judged.add(rank.rank)
            status = exit_status(rank.process.returncode)
            if status not in (FINISHED, STOPPED):
                self._fail(rank, status, failure_line(rank.log, status))

    def _fail(self, rank: Rank, status: int, line: str) -> None:
        self._failures.append(
            Failure(
                rank=rank.rank, host=self.host, status=status, line=line, log=str(rank.log), time=time.time(),
                after_stop=bool(self._first_request),
            )
        )  # fmt: skip

    def _statuses(self) -> dict[int, int]:
        return {
            rank.rank: HUNG if rank.process.returncode is None else exit_status(rank.process.returncode)
            for rank in self.ranks
        }

    def _stopped_by(self) -> str:
        return stop_reason(self.ranks[0].log) if self.place.node == 0 else ""

    def _forward(self) -> None:
        """Pass requests on, each kind once in a while: the trainer takes a repetition for impatience."""
        while self._requests:
            number, now = self._requests.pop(0), time.monotonic()
            if now - self._first_request.get(number, -SAME_REQUEST_SECONDS) < SAME_REQUEST_SECONDS:
                continue
            self._first_request[number] = now
            say(f"{number.name}: passed on to the ranks")
            # The trainer listens to TERM and USR1; INT would break it off in the midst of whatever it does.
            send(self.ranks, signal.SIGTERM if number is signal.SIGINT else number)

    def _show(self) -> None:
        """Copy what rank 0 has written since the last look to this launcher's own output."""
        if self.place.node != 0:
            return
        try:
            with self.ranks[0].log.open("rb") as file:
                file.seek(self._shown)
                text = file.read()
        except OSError:
            return
        self._shown += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def free_port() -> int:
    """A port that nothing on this machine listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def require_free_port(place: Place) -> None:
    """Refuse a port at which another job of this node may be meeting: its ranks would be joined, silently.

    Raises:
        RuntimeError: something listens there; the input is not at fault, and another life of the job gets another port.
    """
    if place.node != 0:
        return
    with socket.socket() as probe:
        # Connections of a former life that are still closing (TIME_WAIT) do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.master_port))
        except OSError as error:
            raise RuntimeError(
                f"MASTER_PORT: {place.master_port} of {socket.gethostname()} cannot be used ({error.strerror}); "
                "the job's next life, or a new job, takes another"
            ) from None


def say(text: str) -> None:
    """A line among the ranks' output, marked as the launcher's."""
    print(f"{time.strftime('%H:%M:%S')} launcher on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def launch_or_tell(arguments: argparse.Namespace) -> int:
    """Run the ranks of this node and return the exit status.

    What keeps the launcher from it stands in its record, too: the job's keeper sees nothing else of it.
    """
    try:
        return launch(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = BAD_INPUT if isinstance(error, ValueError) else FAILED
        host = socket.gethostname()
        failure = Failure(rank=None, host=host, status=status, line=str(error), log="", time=time.time())
        node = int(os.environ.get("SLURM_NODEID", "0"))
        NodeRecord(node=node, host=host, statuses={}, failures=[failure]).write(arguments.logs)
        return status


def launch(arguments: argparse.Namespace) -> int:
    """Run the ranks of this node and return the exit status.

    Raises:
        ValueError: the command line or the step cannot be.
        RuntimeError: the ranks cannot meet here just now.
    """
    place = Place.of(os.environ, arguments.master)
    require_free_port(place)
    command = list(arguments.command)
    if command[0] == "-m" or command[0].endswith(".py"):
        command.insert(0, sys.executable)
    # One watcher is enough: when this node ends in failure, srun's --kill-on-bad-exit ends the others.
    heartbeat = None
    if arguments.heartbeat and place.node == 0:
        heartbeat = Heartbeat(
            arguments.heartbeat, start_within=arguments.start_within, stale_after=arguments.stale_after
        )
    record = Launcher(command, place, arguments.ranks_per_node, arguments.logs).run(heartbeat)
    record.write(arguments.logs)
    first = first_failure(record.failures)
    if first is not None:
        say(f"first failure here: {first}")
    # Only srun is told 0; the record has the true status for the keeper.
    return FINISHED if arguments.zero_when_stopped and record.status == STOPPED else record.status


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Start and keep the ranks of one node; srun starts one such launcher on each node of a job.",
        epilog="""\
examples:
  python -m megachameleon.launching.node --ranks-per-node 8 tools/train.py run.yaml      # one machine, no SLURM
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 python -m megachameleon.launching.node --ranks-per-node 8 \\
      --master node1:28638 --zero-when-stopped --logs runs/a/logs/1234.0 tools/train.py run.yaml

exit status: 0 finished, 75 stopped on request and saved, 70 hung, else the first failure's (128 + n: signal n)""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="N", help="usually the GPUs of the node")
    parser.add_argument("--master", default=None, metavar="HOST:PORT", help="where ranks meet; needed inside SLURM")
    parser.add_argument(
        "--logs", type=Path, default=None, help="folder of rank-*.log and node-*.json (default: logs/TIME)"
    )
    parser.add_argument("--heartbeat", type=Path, default=None, help="the run's heartbeat.json; ends a hung run")
    parser.add_argument(
        "--start-within", type=float, default=3600.0, metavar="S", help="seconds until its first beat; 0: no limit"
    )
    parser.add_argument(
        "--stale-after", type=float, default=1800.0, metavar="S",
        help="seconds between beats; longer than a step, a validation and a save; 0: no limit",
    )  # fmt: skip
    parser.add_argument(
        "--zero-when-stopped", action="store_true",
        help="0 in place of 75: srun --kill-on-bad-exit would end nodes that still save",
    )  # fmt: skip
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="a program with its arguments; *.py runs by this Python"
    )
    arguments = parser.parse_args(words)
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command:
        parser.error("give the program that each rank runs, such as tools/train.py run.yaml")
    if arguments.ranks_per_node < 1:
        parser.error(f"--ranks-per-node: {arguments.ranks_per_node} must be at least 1")
    if arguments.logs is None:
        arguments.logs = Path("logs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return arguments


if __name__ == "__main__":
    sys.exit(launch_or_tell(parse()))
