"""What the report says in numbers: losses, layouts, stages, shards."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.demo.charts import Series, line_chart
from megachameleon.files import read_json

SINGLE = "one process"
"""The layout that the others are compared with."""
LAYOUT_TITLES = {
    "single": SINGLE,
    "tp2": "TP 2 + SP",
    "pp2": "PP 2, interleaved",
    "cp2": "CP 2, recomputed",
    "dp2": "DP 2, distributed optimizer",
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; empty when it is missing, and without a last line that was cut off."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_optional(path: Path) -> Any:
    """A JSON file, or None when it is missing or damaged."""
    try:
        return read_json(path)
    except ValueError:
        return None


def loss_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One chart a modality: training, and validation on each set; empty before the first step."""
    charts = []
    for field, title in (("loss_text", "Text"), ("loss_image", "Pictures")):
        series = [Series(name="training", points=points(metrics, "train", field), colour="c5")]
        datasets = sorted({str(row["dataset"]) for row in metrics if row.get("kind") == "validation"})
        for number, dataset in enumerate(datasets):
            found = points([r for r in metrics if r.get("dataset") == dataset], "validation", field)
            series.append(Series(name=dataset, points=found, colour=f"c{number % 5}", markers=True))
        if chart := line_chart(series, "step", f"{title}: loss by step"):
            charts.append({"title": title, "svg": chart})
    return charts


def points(metrics: Sequence[Mapping[str, Any]], kind: str, field: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of every row of a kind that has the field; a step that was run again counts once."""
    # by step: after a resume, the later row of a step replaces the earlier
    values = {r["step"]: float(r[field]) for r in metrics if r.get("kind") == kind and r.get(field) is not None}
    return tuple(sorted(values.items()))


def training_facts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Steps, tokens, speed and last losses of the run."""
    rows = [row for row in metrics if row.get("kind") == "train"]
    if not rows:
        return None
    last = rows[-1]
    speeds = sorted(float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second"))
    final: dict[str, dict[str, float]] = {}
    for row in metrics:
        if row.get("kind") == "validation":
            final[str(row["dataset"])] = {
                k: row[k] for k in ("loss", "loss_text", "loss_image") if row.get(k) is not None
            }
    return {
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "speed": speeds[len(speeds) // 2] if speeds else None,
        "last": last,
        "validation": final,
    }


def layout_table(folder: Path) -> dict[str, Any] | None:
    """Losses of the first steps under each layout, and how far apart they are, relative to one process."""
    losses: dict[str, dict[int, float]] = {}
    for name, title in LAYOUT_TITLES.items():
        rows = read_rows(folder / name / "metrics.jsonl")
        found = {row["step"]: float(row["loss"]) for row in rows if row.get("kind") == "train"}
        if found:
            losses[title] = found
    if len(losses) < 2:
        return None
    steps = sorted(set.intersection(*(set(found) for found in losses.values())))
    rows = [{"step": step, "losses": [found[step] for found in losses.values()]} for step in steps]
    reference = losses.get(SINGLE, next(iter(losses.values())))
    differences = {
        title: max((abs(found[s] - reference[s]) / max(abs(reference[s]), 1e-12) for s in steps), default=math.nan)
        for title, found in losses.items()
    }
    return {
        "titles": list(losses),
        "rows": rows,
        "differences": list(differences.values()),
        "worst": max(differences.values()),
    }


def stage_rows(path: Path) -> list[dict[str, Any]]:
    """The stages with the widths of their bars, in percent of the longest and the largest."""
    stages = (read_optional(path) or {}).get("stages", [])
    slowest = max((s.get("seconds") or 0 for s in stages), default=0) or 1
    largest = max((s.get("peak_memory_mb") or 0 for s in stages), default=0) or 1
    return [
        {
            **s,
            "time_width": 100 * (s.get("seconds") or 0) / slowest,
            "memory_width": 100 * (s.get("peak_memory_mb") or 0) / largest,
        }
        for s in stages
    ]


def shard_table(folder: Path) -> list[dict[str, Any]]:
    """Documents, tokens by modality and quarantined records of each dataset."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path in sorted(folder.glob("*/**/*.json")):
        manifest = read_optional(path)
        if not isinstance(manifest, dict) or manifest.get("format") != "megachameleon-shard":
            continue
        row = table[path.relative_to(folder).parts[0]]
        for field in ("num_documents", "num_images", "num_tokens", "num_image_tokens"):
            row[field] += manifest[field]
        row["quarantined"] += sum(manifest["quarantined"].values())
    return [{"name": name, **row} for name, row in table.items()]


def retrieval_table(folder: Path) -> dict[str, Any] | None:
    """For each kind of caption, how often the nearest real picture to the drawing is the prompted one."""
    report = read_optional(folder / "retrieval.json")
    if report is None:
        return None
    ceilings = {row["name"]: row["top1"] for row in report.get("ceiling", [])}
    rows = [{**row, "ceiling": ceilings.get(row["name"])} for row in report["groups"]]
    return {"rows": rows, "gallery": report["gallery"], "prompts": report["prompts"]}
