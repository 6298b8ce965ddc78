"""One small run through the project's own trainer, and its series in a file."""

import gc
import json
import math
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import FailureError
from megachameleon.files import write_text
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.health.guards import Verdict

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

BASE = Path(__file__).with_name("train.yaml")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is trained, and where its results go."""

    folder: Path
    """Of its results."""
    data: Path
    """Where `write_data` wrote."""
    overrides: tuple[str, ...]
    """Of `train.yaml`."""

    @property
    def outcome(self) -> Path:
        """Written when the run has ended; holds its series."""
        return self.folder / "series.json"

    def is_done(self) -> bool:
        """Whether this very run has ended; one with other overrides in the same folder does not count."""
        return self.outcome.exists() and json.loads(self.outcome.read_text())["overrides"] == list(self.overrides)


class Series(Callback):
    """Keeps what the report needs, step by step; a roll-back leaves both passes in it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.troubles: list[dict[str, Any]] = []

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """A row for each step."""
        losses = event.report.losses
        row = {
            "step": event.step,
            "loss": losses.loss,
            "loss_text": losses.loss_text,
            "loss_image": losses.loss_image,
            "log_z": losses.log_z,
            "grad_norm": event.report.grad_norm,
            "lr": event.report.lr,
            **event.report.monitors,
        }
        # JSON has no NaN
        self.steps.append({key: value if math.isfinite(value) else None for key, value in row.items()})

    def on_trouble(self, trainer: "Trainer", event: StepEvent, verdict: Verdict) -> None:
        """What the guards said."""
        self.troubles.append({"step": event.step, "action": verdict.action, "reason": verdict.reason})


def train_one(spec: RunSpec) -> Path:
    """Train in this process, alone, from the start; what ends the run early is part of the outcome.

    Raises:
        ValueError: the configuration cannot be.
    """
    import torch

    from megachameleon.config import load_config
    from megachameleon.parallel.context import parallel_context
    from megachameleon.training.batches import open_data
    from megachameleon.training.trainer import Trainer

    # several runs share the machine, each with a core of its own
    torch.set_num_threads(1)
    # from the start: half of a series cannot be judged
    shutil.rmtree(spec.folder, ignore_errors=True)
    spec.folder.mkdir(parents=True)
    places = [
        f"output_dir={spec.folder / 'run'}",
        f"data.tokenizer={spec.data / 'tokenizer'}",
        f"data.train={{pairs: ['{spec.data / 'pairs'}']}}",
    ]
    config = load_config(str(BASE), [*places, *spec.overrides])
    series, ended = Series(), ""
    data = open_data(config.data, config.training)
    log = spec.folder / "log.txt"
    with log.open("w", encoding="utf-8") as file, redirect_stderr(file), parallel_context(config.parallel) as context:
        try:
            Trainer(config, context, data, [series]).run()
        except FailureError as error:
            ended = str(error)
    gc.collect()  # a trainer is full of cycles, and process groups that are left have threads that spin
    # dozens of runs leave checkpoints that nobody reads
    shutil.rmtree(spec.folder / "run", ignore_errors=True)
    after = config.health.early_warning_after
    outcome = {
        "overrides": list(spec.overrides),
        "watched_after": config.optimizer.warmup_steps if after is None else after,
        "ended": ended,
        "steps": series.steps,
        "troubles": series.troubles,
    }
    write_text(spec.outcome, json.dumps(outcome))
    return spec.outcome
