"""What alarms were worth: told before the loss moved, too late, missed, or false."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.ablations.loss_verdict import LossVerdict, judge_loss
from megachameleon.training.health.growth import first_alarm


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that has ended."""

    setting: str
    """Name of a `Setting`."""
    seed: int
    """Of weights and order of samples."""
    steps: list[dict[str, Any]]
    """A row for each step, as `Series` wrote it."""
    troubles: list[dict[str, Any]]
    """What the guards said: `step`, `action`, `reason`."""
    ended: str
    """Why it ended early; "" where it did not."""
    loss: LossVerdict
    """Without a look at any alarm."""
    watched_after: int = 0
    """Steps before which the early warning did not look."""

    @property
    def alarm(self) -> int | None:
        """The step of the first early warning."""
        return next((t["step"] for t in self.troubles if "early warning" in t["reason"]), None)

    @property
    def num_alarms(self) -> int:
        """Early warnings of the whole run."""
        return sum("early warning" in trouble["reason"] for trouble in self.troubles)

    @property
    def num_spikes(self) -> int:
        """Steps that the spike guard spoke of."""
        return sum("beyond" in trouble["reason"] for trouble in self.troubles)

    @property
    def kind(self) -> str:
        """`hit` (alarm before the loss moved), `late`, `miss`, `false alarm` or `quiet`."""
        if self.loss.moved is None:
            return "quiet" if self.alarm is None else "false alarm"
        if self.alarm is None:
            return "miss"
        # an alarm at the very step is no warning
        return "hit" if self.alarm < self.loss.moved else "late"

    def alarm_with(self, factor: float) -> int | None:
        """The step of the first alarm if norms were allowed to grow by `factor`; log Z apart."""
        watched = self.steps[self.watched_after :]
        found = []
        for modality in ("text", "image"):
            norms = [row.get(f"output_norm/{modality}") or math.nan for row in watched]
            place = first_alarm([math.log(norm) for norm in norms], math.log(factor))
            found += [] if place is None else [watched[place]["step"]]
        return min(found, default=None)

    def column(self, name: str) -> list[float]:
        """One series, NaN where it was not finite."""
        return [math.nan if row.get(name) is None else row[name] for row in self.steps]


def read_result(path: Path, setting: str, seed: int) -> RunResult:
    """Read what `one_run.py` wrote."""
    outcome = json.loads(path.read_text(encoding="utf-8"))
    losses = [math.nan if row["loss"] is None else row["loss"] for row in outcome["steps"]]
    return RunResult(
        setting=setting,
        seed=seed,
        steps=outcome["steps"],
        troubles=outcome["troubles"],
        ended=outcome["ended"],
        loss=judge_loss(losses),
        watched_after=outcome["watched_after"],
    )


def describe(results: Sequence[RunResult]) -> dict[str, str]:
    """One line of the table: what became of the runs of a setting."""
    leads = [r.loss.moved - r.alarm for r in results if r.kind == "hit" and r.loss.moved and r.alarm]
    moved = [r.loss.moved for r in results if r.loss.moved is not None]
    counts = {kind: sum(r.kind == kind for r in results) for kind in ("hit", "late", "miss", "false alarm", "quiet")}
    return {
        "runs": str(len(results)),
        "diverged": str(sum(r.loss.diverged for r in results)),
        "loss moved": str(len(moved)),
        "at step": span(moved),
        **{kind: str(count) for kind, count in counts.items()},
        "lead": span(leads),
        "final loss": span([r.loss.last for r in results], ".2f"),
    }


def span(values: Sequence[float], form: str = ".0f") -> str:
    """Lowest, median and highest."""
    if not values:
        return "none"
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return f"{ordered[0]:{form}} · {middle:{form}} · {ordered[-1]:{form}}"
