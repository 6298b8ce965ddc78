"""Run commands and watch them: wall time, and the memory of all their processes together."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS_BETWEEN_POLLS = 0.05
SECONDS_BETWEEN_SAMPLES = 0.5
"""Of memory, which costs milliseconds to add up."""
SECONDS_TO_STOP = 20.0
"""For processes to end by themselves, after an interruption."""

Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A command that ended with an error, and the end of what it said, if that went to a log."""

    command: Command
    status: int
    """As `Popen.returncode`."""
    last_words: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How commands ended; `interrupted` when they were stopped from the keyboard or by a signal."""

    seconds: float
    """Wall time."""
    peak_memory_mb: float
    """MiB of all processes together."""
    failure: Failure | None = None
    interrupted: bool = False


@dataclass(kw_only=True)
class Running:
    """A process and the commands that wait for its end."""

    process: subprocess.Popen
    command: Command
    following: deque[Command]
    log: Path | None


def run_chains(
    chains: Sequence[Sequence[Command]],
    *,
    at_once: int,
    environment: Mapping[str, str],
    folder: Path,
    logs: Path | None = None,
    on_finished: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run chains of commands, each chain in order, `at_once` chains at a time; the first failure ends all.

    An interruption is passed on to the commands: they get time to end, and are then killed with their children.

    Args:
        environment: variables beside those of this process.
        folder: where the commands run.
        logs: beginning of the names of files for what the commands say; None leaves it on this terminal.
        on_finished: is called after each command.
    """
    waiting = deque(deque(chain) for chain in chains if chain)
    running: list[Running] = []
    started, peak, next_sample, count = time.monotonic(), 0, 0.0, 0
    failure, interrupted = None, False
    try:
        while (waiting or running) and failure is None and not interrupted:
            while waiting and len(running) < at_once:
                chain = waiting.popleft()
                running.append(
                    start(chain, environment, folder, logs and logs.with_name(f"{logs.name}-{count:02d}.log"))
                )
                count += 1
            if time.monotonic() >= next_sample:
                peak = max(peak, memory_of_families([one.process.pid for one in running]))
                next_sample = time.monotonic() + SECONDS_BETWEEN_SAMPLES
            time.sleep(SECONDS_BETWEEN_POLLS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                interrupted = interrupted or was_interrupted(one.process.returncode)
                if one.process.returncode:
                    failure = failure or Failure(
                        command=one.command, status=one.process.returncode, last_words=last_lines(one.log)
                    )
                elif one.following:
                    # in front, so that a chain that has begun ends before another begins
                    waiting.appendleft(one.following)
                on_finished()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stop(running)
    seconds = time.monotonic() - started
    return Outcome(seconds=seconds, peak_memory_mb=peak / 2**20, failure=failure, interrupted=interrupted)


def start(chain: deque[Command], environment: Mapping[str, str], folder: Path, log: Path | None) -> Running:
    """Start the first command of a chain; in a session of its own, so that Ctrl-C is ours to pass on."""
    command = chain.popleft()
    variables = {**os.environ, **environment}
    if log is None:
        process = subprocess.Popen(command, env=variables, cwd=folder, start_new_session=True)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=variables, cwd=folder, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )
    return Running(process=process, command=command, following=chain, log=log)


def was_interrupted(status: int) -> bool:
    """Whether a process ended because of Ctrl-C."""
    return status in (-signal.SIGINT, 128 + signal.SIGINT)


def stop(running: Sequence[Running]) -> None:
    """Interrupt processes and their children, wait, and kill those that do not end.

    torchrun's launcher would explain its own end at length, and its workers need it no more: it is killed at once.
    """
    launchers = [one.process for one in running if "torch.distributed.run" in one.command]
    # before the launchers die: children of the dead are found no more
    members = [member for one in running for member in family_of(one.process.pid)]
    for launcher in launchers:
        launcher.kill()
    for member in members:
        with suppress(psutil.Error):
            member.send_signal(signal.SIGINT)
    # a second Ctrl-C cuts the waiting short
    with suppress(KeyboardInterrupt):
        psutil.wait_procs(members, timeout=SECONDS_TO_STOP)
    for member in members:
        with suppress(psutil.Error):
            member.kill()
    for one in running:
        one.process.wait()


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.Error:
        return []


def memory_of_families(pids: Sequence[int]) -> int:
    """Bytes of processes and their descendants; memory that they share counts once over all of them."""
    total = 0
    for process in (process for pid in pids for process in family_of(pid)):
        with suppress(psutil.Error, AttributeError):
            # PSS shares pages among those that map them; RSS would count torch once a process
            total += process.memory_full_info().pss
    return total


def last_lines(log: Path | None, count: int = 12) -> str:
    """The end of a log."""
    if log is None:
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
