"""Stages that are done once: run in order, skipped when done, resumed when interrupted, measured in time and memory."""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.process import Command, Outcome, run_chains
from megachameleon.console import progress_bar
from megachameleon.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of the demo.

    Attributes:
        name: short and unique.
        title: what the person at the terminal and in the report reads.
        chains: command lines; those of a chain run in order, and each goes on where an interrupted run of it stopped.
        outputs: files and folders that exist when the stage is done, and are removed when it must be done anew.
        expected_seconds: on two cores.
        needs: names of the stages whose results it reads; when they are done anew, so is this one.
        inputs: files of the project, relative to its root, that decide its results, such as a configuration.
        environment: variables of its processes.
        at_once: chains that run at the same time.
        quiet: many small commands, of which only one common progress bar is shown; what they say goes to logs.
    """

    name: str
    title: str
    chains: tuple[tuple[Command, ...], ...]
    outputs: tuple[Path, ...]
    expected_seconds: float
    needs: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    at_once: int = 1
    quiet: bool = False


class StageError(Exception):
    """A command of a stage ended with an error, which it has already explained; carries its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Pipeline:
    """Runs stages from the project's root, and remembers which are done, in which time and memory."""

    def __init__(self, stages: Sequence[Stage], record: Path, project: Path) -> None:
        self.stages = stages
        self.project = project
        self.record = record
        self.entries: dict[str, dict[str, Any]] = {}
        if record.exists():
            self.entries = {entry["name"]: entry for entry in read_json(record)["stages"]}
        self.console = Console(stderr=True, highlight=False)

    def run(self) -> None:
        """Run every stage that is not done.

        Raises:
            StageError: a command ended with an error.
            KeyboardInterrupt: the person stopped it; the same call goes on later.
        """
        fingerprints = self.fingerprints()
        for number, stage in enumerate(self.stages):
            if self.is_done(stage, fingerprints[stage.name]):
                self.headline(number, "done")
                continue
            # before it runs: after a kill in between, their results would pass for good ones
            self.forget([later.name for later in self.stages if stage.name in later.needs])
            self.headline(number, f"about {in_words(self.expected(stage))}; the report in {in_words(self.remaining())}")
            self.run_stage(stage, fingerprints[stage.name])

    def forget(self, names: Sequence[str]) -> None:
        """Let these stages be done anew, and all that need them."""
        again = set(names)
        for stage in self.stages:
            if stage.name in again or again & set(stage.needs):
                again.add(stage.name)
                if stage.name in self.entries:
                    self.save(self.entries[stage.name] | {"done": False, "fingerprint": ""})

    def run_stage(self, stage: Stage, fingerprint: str) -> None:
        """Run one stage, from its beginning unless the very same stage was interrupted before."""
        entry = self.entries.get(stage.name, {})
        # otherwise it was interrupted, and its tools go on from what they have left
        if entry.get("fingerprint") != fingerprint or entry.get("done"):
            for output in stage.outputs:
                remove(output)
            entry = {"fingerprint": fingerprint, "seconds": 0.0, "peak_memory_mb": 0.0}
        entry |= {"name": stage.name, "title": stage.title, "done": False}
        self.save(entry)
        outcome = self.run_commands(stage)
        entry["seconds"] = round(entry["seconds"] + outcome.seconds, 2)
        entry["peak_memory_mb"] = round(max(entry["peak_memory_mb"], outcome.peak_memory_mb), 1)
        self.save(entry)
        # after its time is saved: an interrupted stage goes on, and both parts count
        check(stage, outcome)
        if missing := [str(path) for path in stage.outputs if not path.exists()]:
            raise StageError(f"{stage.title}: its commands left no {missing[0]}", 1)
        self.save(entry | {"done": True})

    def run_commands(self, stage: Stage) -> Outcome:
        """Run the commands of a stage and watch them."""
        logs = self.record.parent / "logs" / stage.name if stage.quiet else None
        total = sum(len(chain) for chain in stage.chains)
        with progress_bar(stage.title, total, enabled=stage.quiet) as bar:
            return run_chains(
                stage.chains,
                at_once=stage.at_once,
                environment=stage.environment,
                folder=self.project,
                logs=logs,
                on_finished=bar.advance,
            )

    def is_done(self, stage: Stage, fingerprint: str) -> bool:
        """Whether this very stage has ended well and its results are there."""
        entry = self.entries.get(stage.name, {})
        same = entry.get("fingerprint") == fingerprint
        return same and entry.get("done", False) and all(path.exists() for path in stage.outputs)

    def fingerprints(self) -> dict[str, str]:
        """Of each stage: its commands, its input files, and the stages that it needs."""
        found: dict[str, str] = {}
        for stage in self.stages:
            what = {
                "commands": stage.chains,
                # contents and not times: a fresh checkout has other times
                "inputs": [(self.project / path).read_text(encoding="utf-8") for path in stage.inputs],
                "needs": [found[name] for name in stage.needs],
            }
            found[stage.name] = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        return found

    def save(self, entry: dict[str, Any]) -> None:
        """Keep the entry of a stage; the file holds the stages of this pipeline in order."""
        self.entries[entry["name"]] = dict(entry)
        kept = [self.entries[stage.name] for stage in self.stages if stage.name in self.entries]
        write_json(self.record, {"stages": kept})

    def expected(self, stage: Stage) -> float:
        """Seconds that a stage will take, from what the stages before it took against what was expected."""
        done = [(s, self.entries[s.name]) for s in self.stages if self.entries.get(s.name, {}).get("done")]
        planned = sum(s.expected_seconds for s, _ in done)
        pace = sum(entry["seconds"] for _, entry in done) / planned if planned else 1.0
        # bounded, because the first stages are short and say little
        return stage.expected_seconds * min(max(pace, 0.2), 5.0)

    def remaining(self) -> float:
        """Seconds of all stages that are not done."""
        return sum(self.expected(s) for s in self.stages if not self.entries.get(s.name, {}).get("done"))

    def headline(self, number: int, note: str) -> None:
        """One line above a stage's own output."""
        title = f"[bold]{number + 1}/{len(self.stages)} {self.stages[number].title}[/bold]"
        # headlines go to stderr, and would overtake what is still buffered
        sys.stdout.flush()
        self.console.print(f"{title} [dim]· {note}[/dim]")


def check(stage: Stage, outcome: Outcome) -> None:
    """Raise for a stage that was interrupted or has failed."""
    if outcome.interrupted:
        raise KeyboardInterrupt
    if failure := outcome.failure:
        said = f"{failure.last_words}\n" if failure.last_words else ""
        line = " ".join(failure.command)
        above = "; the reason stands above torchrun's own lines" if "torch.distributed.run" in failure.command else ""
        raise StageError(
            f"{said}stage {stage.name!r} failed with exit status {failure.status}{above}; its command was: {line}",
            failure.status if failure.status in (1, 2) else 1,
        )


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def in_words(seconds: float) -> str:
    """A duration that promises no more than it knows."""
    return f"{max(round(seconds / 10) * 10, 10)} s" if seconds < 90 else f"{round(seconds / 60)} min"
