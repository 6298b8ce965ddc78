"""The tables and pictures of the ablations, from the runs' series."""

from collections.abc import Sequence
from pathlib import Path

from examples.ablations.alarm_verdict import RunResult, describe
from examples.ablations.figures import COLOURS, Line, Panel, draw
from examples.ablations.settings import SETTINGS
from megachameleon.files import write_text

LEGEND = "five seeds each; triangle: early warning; circle: the loss moved; blue: text, red: pictures"


def write_report(results: dict[str, list[RunResult]], pictures: Path | None) -> str:
    """Write a picture of each group, and return the tables as Markdown."""
    parts = []
    for group, runs in results.items():
        by_setting = {s.name: [r for r in runs if r.setting == s.name] for s in SETTINGS}
        by_setting = {name: found for name, found in by_setting.items() if found}
        parts.append(f"### {group}\n\n{table(by_setting)}\n\nTotal: {totals(runs)}")
        if pictures is not None:
            rows = [panels(name, found) for name, found in by_setting.items()]
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


def panels(name: str, runs: Sequence[RunResult]) -> list[Panel]:
    """Loss, output norms and log Z of one setting."""
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
        Panel(title=f"{name}: loss", lines=loss, limits=(3.0, 7.0)),
        Panel(title="output norm", lines=norms, limits=(0.1, 1e7), logarithmic=True),
        Panel(title="log Z", lines=log_z, limits=(4.0, 12.0)),
    ]
