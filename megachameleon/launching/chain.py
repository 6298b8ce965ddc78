"""Stages one after the other: each waits for the one before, and one job tells a person when any of them fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachameleon.launching.slurm import ask
from megachameleon.launching.submission import SCRIPTS, submit


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A script to submit and a name to call it by."""

    name: str
    """In what the alarm says."""
    script: Path
    options: tuple[str, ...] = ()
    """Of sbatch."""
    arguments: tuple[str, ...] = ()
    """Of the script."""


def after(previous: str) -> tuple[str, ...]:
    """Options of a job that needs another's success, and is cancelled, not left pending, without it."""
    return (f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes") if previous else ()


def submit_chain(
    stages: Sequence[Stage], *, first_after: str = "", options: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Submit the stages so that each starts when the one before has finished.

    Args:
        first_after: id of a job that the first waits for, or empty.
        options: of sbatch, for the job that raises the alarm: partition and account.

    Returns:
        Names and ids of the jobs, the alarm's last.
    """
    jobs: list[tuple[str, str]] = []
    previous = first_after
    try:
        for stage in stages:
            previous = submit(stage.script, *stage.options, *after(previous), arguments=stage.arguments)
            jobs.append((stage.name, previous))
        # `?`: when any of them has failed; if none does, the condition becomes impossible and SLURM removes the job
        condition = "?".join(f"afternotok:{job}" for _, job in jobs)
        alarm = submit(
            SCRIPTS / "alert.sbatch", f"--dependency={condition}", "--kill-on-invalid-dep=yes", *options,
            arguments=[f"{name}={job}" for name, job in jobs],
        )  # fmt: skip
    except RuntimeError:
        if jobs:  # a chain is submitted whole or not at all
            ask("scancel", *(job for _, job in jobs))
        raise
    return [*jobs, ("alert", alarm)]


def conversion(run: Path, destination: str, options: Sequence[str] = ()) -> Stage:
    """The stage that turns a run's newest checkpoint into Hugging Face's form."""
    return Stage(
        name="convert", script=SCRIPTS / "convert.sbatch", options=tuple(options), arguments=(str(run), destination)
    )
