"""A run's attempts, and whether another is worth it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megachameleon.files import write_text
from megachameleon.launching.failures import BAD_INPUT, FINISHED, STOPPED
from megachameleon.training.stopping import FILE_FOUND, describe_stop

ATTEMPTS_FILE = "attempts.jsonl"
RUNNING = "is running"
"""What stands in the file while an attempt runs."""
CUT_OFF = "was cut off with its job: a dead node, or SLURM ended it before it could save"
"""What the next attempt writes in its place when nobody lived to say more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One life of a job that trains a run."""

    submission: str
    """The job that a person submitted; follow-up jobs keep its id."""
    job: str
    """SLURM's job id and how often it was requeued before: 1234.0."""
    status: int
    """Exit status; 75: stopped, and may go on."""
    line: str
    """One line for people."""
    before: int
    """Step of the newest complete checkpoint when it began; -1: none."""
    after: int
    """The same when it ended."""
    hosts: list[str]
    """Nodes, in SLURM's order."""
    seconds: float
    """From the start of the step to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What becomes of the job."""

    action: Literal["finish", "rest", "again", "alert"]
    """The job is done, rests until a person submits it again, is started again, or needs a person."""
    reason: str
    """In words, for the log."""


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run, or -1."""
    # The manifest is what makes a checkpoint complete; a folder without one is none.
    found = (run / "checkpoints").glob("step_*/manifest.json")
    steps = (path.parent.name.removeprefix("step_") for path in found)
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts so far, oldest first.

    Raises:
        ValueError: the file was damaged.
    """
    path = run / ATTEMPTS_FILE
    try:
        return [Attempt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a list of attempts ({error}); move it away") from None


def write_attempts(run: Path, attempts: list[Attempt]) -> None:
    """Write all attempts, whole or not at all."""
    write_text(run / ATTEMPTS_FILE, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def decide(attempts: list[Attempt], *, max_attempts: int, max_idle: int) -> Decision:
    """Go on while it leads somewhere.

    Args:
        attempts: all of the run, the one that just ended last. Those of earlier submissions do not count: a person has
            looked at them.
        max_attempts: so many in all, however much they achieve.
        max_idle: so many in a row that brought no new checkpoint; the last of them alerts.
    """
    last = attempts[-1]
    if last.status == FINISHED:
        return Decision(action="finish", reason="finished")
    # Signals and the end of the time are SLURM's, and the job goes on after them; the stop file is a person's.
    if last.status == STOPPED and describe_stop(FILE_FOUND) in last.line:
        return Decision(action="rest", reason="a person asked it to stop; submit it again to go on")
    if last.status == BAD_INPUT:
        return Decision(action="alert", reason=f"the input is at fault, and trying again cannot help: {last.line}")
    own = [attempt for attempt in attempts if attempt.submission == last.submission]
    idle = 0
    for attempt in reversed(own):
        if attempt.after > attempt.before:
            break
        idle += 1
    # Before the number of attempts: "nothing is achieved" says more than "too many".
    if idle >= max_idle:
        return Decision(
            action="alert", reason=f"{idle} attempts in a row without a new checkpoint; the last: {last.line}"
        )
    if len(own) >= max_attempts:
        return Decision(action="alert", reason=f"{len(own)} attempts, which is the limit; the last: {last.line}")
    where = f"going on from step {last.after}" if last.after >= 0 else "beginning again"
    return Decision(action="again", reason=f"{where}: {last.job} {last.line}")
