"""A trial: a run that is disturbed, started again until it finishes, and compared with a calm one."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import BALLAST, Fault
from life import Life, live
from tiny_corpus import corpus_overrides

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one-bf16": (1, ("training.precision=bf16",)),
    "TP2-SP": (2, ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true")),
    "PP2": (2, ("parallel.pipeline_parallel=2",)),
    "DP2-distributed": (
        2,
        (
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ),
    ),
    "PP2-DP2": (4, ("parallel.pipeline_parallel=2", "parallel.distributed_optimizer=true")),
}
"""Name -> processes and settings."""

NUM_STEPS = 12
HANG_TIMEOUT, START_TIMEOUT = 20, 40
PATIENCE = START_TIMEOUT + HANG_TIMEOUT
"""Seconds within which all ranks must be down after the first."""
SETTINGS = (
    f"training.num_steps={NUM_STEPS}",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.validate_every=5",
    "training.validation_samples=4",
    "data.sequence_length=32",
    "model.context_length=32",
    "model.dropout=0.1",
    "checkpoint.every=2",
    "checkpoint.keep_last=2",
    f"faults.hang_timeout={HANG_TIMEOUT}",
    f"faults.start_timeout={START_TIMEOUT}",
)
MOST_LIVES = 12
COMPARED = ("step", "loss", "loss_text", "loss_image", "log_z", "log_z_squared", "grad_norm", "lr", "tokens")
SAVED_AND_TO_BE_CONTINUED = 75


@dataclass
class Trial:
    """What was done to a run, and what came of it."""

    number: int
    layout: str
    done: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    problem: str | None = None
    """None: the finished run is bit-equal to the calm one."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run is compared by."""

    files: dict[str, str]
    """SHA-256 of the last checkpoint's tensors, by file name."""
    progress: dict[str, Any]
    metrics: list[dict[str, Any]]
    """The deterministic values of every training step, in order."""


def write_config(corpus: Path, folder: Path, layout: str) -> Path:
    """A configuration whose run lives in `folder`."""
    from megachameleon.config import load_config, to_yaml

    settings = (*corpus_overrides(corpus), *SETTINGS, *LAYOUTS[layout][1], f"output_dir={folder}")
    path = folder.parent / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(load_config("debug", settings)))
    return path


def outcome_of(folder: Path) -> Outcome:
    """The result of a finished run."""
    newest = sorted((folder / "checkpoints").glob("step_*[0-9]"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    progress = json.loads((newest / "progress.json").read_text())
    progress.pop("callbacks")  # clocks
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        files={name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")},
        progress=progress,
        metrics=[{key: line[key] for key in COMPARED} for line in lines if line["kind"] == "train"],
    )


def difference(got: Outcome, expected: Outcome) -> str | None:
    """What differs first; None if nothing does."""
    if got.progress != expected.progress:
        return f"progress {got.progress}, expected {expected.progress}"
    if got.files != expected.files:
        names = sorted(name for name in expected.files if got.files.get(name) != expected.files[name])
        return f"tensors differ in {', '.join(names) or sorted(got.files)}"
    if got.metrics != expected.metrics:
        steps = [line["step"] for line in got.metrics]
        pairs = zip(got.metrics, expected.metrics, strict=False)
        first = next((f"step {b['step']}: {a}, expected {b}" for a, b in pairs if a != b), f"steps {steps}")
        return f"metrics differ: {first}"
    return None


def run_trial(
    context: Any, corpus: Path, folder: Path, layout: str, disturbances: Sequence[Any], expected: Outcome, number: int
) -> Trial:
    """Disturb a run as told, let it finish, compare.

    Args:
        disturbances: for each life, in order: a `Fault`, or a function of the run's folder that is called before the
            life begins (it damages what the run has left) and returns what it did.
    """
    trial = Trial(number, layout)
    run = folder / "run"
    config = write_config(corpus, run, layout)
    world_size = LAYOUTS[layout][0]
    waiting = list(disturbances)
    while trial.problem is None:
        fault = None
        while waiting and fault is None:
            item = waiting.pop(0)
            if isinstance(item, Fault):
                fault = item
            else:
                trial.done.append(item(run))
        (folder / BALLAST).unlink(missing_ok=True)
        life = live(context, config, world_size, fault, run, PATIENCE)
        trial.lives.append(life)
        trial.done.append(f"{fault or 'calm'} -> {life.statuses}")
        trial.problem = _problem_of(life, fault, len(trial.lives))
        if set(life.statuses) == {0}:
            break
    if trial.problem is None:
        trial.problem = difference(outcome_of(run), expected)
    if trial.problem is None:
        shutil.rmtree(folder, ignore_errors=True)  # a mounted disk stays, empty
    return trial


def _problem_of(life: Life, fault: Fault | None, lives: int) -> str | None:
    """What must not be, however a life ends."""
    if life.hung and not (fault and fault.kind == "SIGSTOP" and life.hung == (fault.rank,)):
        return f"ranks {life.hung} did not end by themselves"
    if fault is None and any(life.statuses):
        return f"an undisturbed life ended with {life.statuses}"
    if fault and fault.kind in ("SIGTERM", "SIGUSR1"):
        # Before handlers are installed a signal may still end the process as it always did.
        early = fault.place in ("start", "index", "anywhere")
        if not early and set(life.statuses) - {0} not in (set(), {SAVED_AND_TO_BE_CONTINUED}):
            return f"asked to stop, ended with {life.statuses}"
    if lives > MOST_LIVES:
        return f"not finished after {lives} lives"
    return None


def damage(how: str, seed: int) -> Any:
    """A function that damages the newest checkpoint of a run."""

    def apply(run: Path) -> str:
        found = sorted((run / "checkpoints").glob("step_*[0-9]"))
        whole = [path for path in found if (path / "manifest.json").exists()]
        if len(whole) < 2:
            return "nothing to damage"
        generator = random.Random(seed)
        files = sorted(path for path in whole[-1].iterdir() if path.stat().st_size)
        target = generator.choice(files)
        data = bytearray(target.read_bytes())
        if how == "missing":
            target.unlink()
        elif how == "truncated":
            target.write_bytes(data[: generator.randrange(len(data))])
        elif how == "flipped":
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            target.write_bytes(data)
        return f"{how} {whole[-1].name}/{target.name}"

    return apply
