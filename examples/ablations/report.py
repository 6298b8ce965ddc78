"""The tables and pictures of the ablations, from the runs' series."""

import math
from collections.abc import Sequence
from pathlib import Path

from examples.ablations.alarm_verdict import RunResult, describe
from examples.ablations.figures import COLOURS, Line, Panel, draw
from examples.ablations.settings import SETTINGS
from megachameleon.files import write_text

LEGEND = "By step, a line a seed. Triangle: first early warning. Circle: loss moved. Norms: text blue, pictures red."
FACTORS = (3, 4, 5, 6, 8)
"""Growth of an output norm that would be an alarm, to see what the choice of 4 decides."""


def write_report(results: dict[str, list[RunResult]], pictures: Path | None) -> str:
    """Write a picture of each group, and return the tables as Markdown."""
    parts = []
    for group, runs in results.items():
        by_setting = {s.name: [r for r in runs if r.setting == s.name] for s in SETTINGS}
        by_setting = {name: found for name, found in by_setting.items() if found}
        parts.append(f"### {group}\n\n{table(by_setting)}\n\nTotal: {totals(runs)}\n\n{other_factors(runs)}")
        if pictures is not None:
            lowest = min(run.loss.best for run in runs)
            # one lower limit for the group, a multiple of 0.5, so that panels can be compared
            rows = [panels(name, found, math.floor(2 * lowest) / 2) for name, found in by_setting.items()]
            write_text(pictures / f"stability_{group}.svg", draw(rows, LEGEND))
    return "\n\n".join(parts)


def table(by_setting: dict[str, list[RunResult]]) -> str:
    """A row for each setting; ranges are lowest · median · highest."""
    lines: list[str] = []
    for name, runs in by_setting.items():
        row = describe(runs)
        if not lines:
            lines = ["| setting | " + " | ".join(row) + " |", "|" + "---|" * (len(row) + 1)]
        lines.append(f"| {name} | " + " | ".join(row.values()) + " |")
    return "\n".join(lines)


def totals(runs: Sequence[RunResult]) -> str:
    """Steps, alarms and spikes over all runs of a group."""
    steps = sum(len(run.steps) for run in runs)
    quiet = [run for run in runs if run.loss.moved is None]
    return (
        f"{steps:,} steps; {sum(r.num_alarms for r in runs)} alarms in {sum(r.alarm is not None for r in runs)} runs; "
        f"{sum(r.num_spikes for r in runs)} steps called spikes; of {len(quiet)} runs whose loss did not move, "
        f"{sum(r.alarm is not None for r in quiet)} had an alarm"
    )


def other_factors(runs: Sequence[RunResult]) -> str:
    """What the same runs would have had with other limits on output norms, replayed from their series."""
    lines = ["| factor | told before the loss moved | late | missed | alarms in runs whose loss did not move |"]
    lines.append("|---|---|---|---|---|")
    for factor in FACTORS:
        pairs = [(run.alarm_with(factor), run.loss.moved) for run in runs]
        told = sum(alarm is not None and moved is not None and alarm < moved for alarm, moved in pairs)
        late = sum(alarm is not None and moved is not None and alarm >= moved for alarm, moved in pairs)
        missed = sum(alarm is None and moved is not None for alarm, moved in pairs)
        quiet = [alarm for alarm, moved in pairs if moved is None]
        lines.append(f"| {factor} | {told} | {late} | {missed} | {sum(a is not None for a in quiet)} of {len(quiet)} |")
    return "\n".join(lines)


def panels(name: str, runs: Sequence[RunResult], lowest: float) -> list[Panel]:
    """Loss, from `lowest` up, output norms and log Z of one setting, by step."""
    marks = [[run.alarm] if run.alarm else [] for run in runs]
    rings = [[run.loss.moved] if run.loss.moved else [] for run in runs]
    loss = [
        Line(values=run.column("loss"), colour=COLOURS["loss"], marks=mark, rings=ring)
        for run, mark, ring in zip(runs, marks, rings, strict=True)
    ]
    norms = [
        Line(values=run.column(f"output_norm/{modality}"), colour=COLOURS[modality], marks=mark)
        for modality in ("text", "image")
        for run, mark in zip(runs, marks, strict=True)
    ]
    log_z = [Line(values=run.column("log_z"), colour=COLOURS["loss"]) for run in runs]
    return [
        Panel(title=f"{name}: loss", lines=loss, limits=(lowest, 6.6)),
        Panel(title="output norm", lines=norms, limits=(0.1, 1e9), logarithmic=True),
        Panel(title="log Z", lines=log_z, limits=(5.0, 11.0)),
    ]
