"""Preparing pictures for the image tokenizer: ours against Pillow and others on the same JPEGs, interleaved.

A step decodes, resizes and crops every picture. Times are CPU seconds of the process, so on an idle core they are those
of the clock. Ratios are their time over ours, so above 1 we are faster; pixels are compared with plain Pillow's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from benchmarks.contestants.pictures import Preparer
    from benchmarks.measuring import Timing

NAMES = ("ours", "ours-exact", "pillow", "pillow-draft", "huggingface", "opencv-area", "opencv-lanczos")
DEFAULT_NAMES = ("ours", "ours-exact", "pillow")
REFERENCE = "pillow"
"""Whose pixels the others are compared with."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    for name in ("pictures", "width", "height", "size", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: {getattr(arguments, name)} must be at least 1")
    if "ours" not in arguments.contestants or arguments.warmup < 0:
        raise ValueError("--contestants: must hold ours, which ratios are against; --warmup: must not be negative")
    import torch

    from benchmarks.machine import describe_machine
    from benchmarks.measuring import Plan, interleave
    from benchmarks.parking import Parking
    from megachameleon.files import write_text

    # speeds are of one core, since workers each have one
    torch.set_num_threads(1)
    device = torch.device("cpu")
    machine = describe_machine(device)
    jpegs = read_jpegs(arguments)
    contestants = build(arguments.contestants, jpegs, arguments.size)
    distances = measure_distances(contestants, jpegs, arguments.size)
    plan = Plan(rounds=arguments.rounds, warmup=arguments.warmup, steps_per_turn=1, settle=0)
    timings = interleave(contestants, plan, device, Parking(device, enabled=False))
    rows = summarise(list(contestants), timings, distances, len(jpegs))
    print_rows(rows, jpegs)
    if arguments.output:
        about = {"command": [sys.executable, *sys.argv], "machine": machine, "arguments": vars(arguments)}
        found = {"mean_bytes": sum(map(len, jpegs)) / len(jpegs), "rows": rows, "samples": list(map(asdict, timings))}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


def read_jpegs(arguments: argparse.Namespace) -> list[bytes]:
    """Those of `--folder`, or drawn from a seed."""
    from benchmarks.photographs import make_jpegs

    if arguments.folder is None:
        return make_jpegs(arguments.pictures, arguments.width, arguments.height, seed=0)
    files = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"--folder {arguments.folder}: holds no .jpg or .jpeg; leave it out to draw pictures")
    return [path.read_bytes() for path in files[: arguments.pictures]]


class AllPictures:
    """One contestant; a step prepares every picture."""

    def __init__(self, prepare: "Preparer", jpegs: Sequence[bytes], size: int) -> None:
        self.prepare, self.jpegs, self.size = prepare, jpegs, size

    def step(self, number: int) -> float:
        """A pixel of the last picture."""
        for data in self.jpegs:
            prepared = self.prepare(data, self.size)
        return float(prepared[0, 0, 0])


def build(names: Sequence[str], jpegs: Sequence[bytes], size: int) -> dict[str, AllPictures]:
    """Contestants by name.

    Raises:
        ValueError: a peer is not installed.
    """
    from benchmarks.contestants.pictures import BUILDERS

    built = {}
    for name in names:
        try:
            built[name] = AllPictures(BUILDERS[name](), jpegs, size)
        except ImportError as error:
            raise ValueError(f"--contestants: {name} needs a package that is not here ({error})") from None
    return built


def measure_distances(
    contestants: Mapping[str, AllPictures], jpegs: Sequence[bytes], size: int
) -> dict[str, tuple[float, int]]:
    """Mean and largest absolute difference from plain Pillow, of 255, over all pictures."""
    import numpy as np

    from benchmarks.contestants.pictures import BUILDERS

    sums, most = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0)
    for data in jpegs:
        reference = BUILDERS[REFERENCE]()(data, size).astype(int)
        for name, contestant in contestants.items():
            difference = np.abs(contestant.prepare(data, size) - reference)
            sums[name] += float(difference.mean())
            most[name] = max(most[name], int(difference.max()))
    return {name: (sums[name] / len(jpegs), most[name]) for name in contestants}


def summarise(
    names: Sequence[str], timings: "Sequence[Timing]", distances: Mapping[str, tuple[float, int]], pictures: int
) -> list[dict[str, Any]]:
    """One row a contestant."""
    from benchmarks.measuring import Spread, by_round, ratios

    def seconds(timing: "Timing") -> float:
        return timing.cpu_seconds

    rows = []
    for name in names:
        taken = Spread.of([value / pictures for value in by_round(timings, name, seconds)])
        rows.append(
            {
                "name": name,
                "seconds_per_picture": asdict(taken),
                "pictures_per_second": 1 / taken.median,
                "ratio": asdict(Spread.of(list(ratios(timings, name, "ours", seconds)))),
                "mean_difference": distances[name][0],
                "largest_difference": distances[name][1],
            }
        )
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], jpegs: Sequence[bytes]) -> None:
    """The table."""
    from rich import box
    from rich.table import Table

    from benchmarks.report import open_console

    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1e3
    caption = f"{len(jpegs)} JPEGs of {kilobytes:.0f} KB; CPU time; ratio: time over ours; in brackets, quartiles"
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("", "pictures/s", "ms", "ratio", "mean |d|", "max |d|"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        taken, ratio = row["seconds_per_picture"], row["ratio"]
        table.add_row(
            row["name"],
            f"{row['pictures_per_second']:.1f}",
            f"{1e3 * taken['median']:.2f} [{1e3 * taken['low_quartile']:.2f} {1e3 * taken['high_quartile']:.2f}]",
            f"{ratio['median']:.2f} [{ratio['low_quartile']:.2f} {ratio['high_quartile']:.2f}]",
            f"{row['mean_difference']:.4f}",
            str(row["largest_difference"]),
        )
    open_console().print(table)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare ways to prepare pictures: speed of one core, and distance from Pillow's pixels.",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.picture_preparation --output pictures.json
  python -m benchmarks.picture_preparation --folder photographs --contestants ours pillow opencv-area

Without --folder the JPEGs are drawn from a seed. huggingface needs transformers, opencv-* opencv-python-headless.""",
    )
    parser.add_argument(
        "--contestants", nargs="+", choices=NAMES, default=list(DEFAULT_NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="real JPEGs instead of drawn ones")
    for name, default, meaning in (
        ("pictures", 24, "how many"),
        ("width", 1024, "of the drawn ones"),
        ("height", 768, "of the drawn ones"),
        ("size", 512, "side of the square they become"),
        ("rounds", 9, "that count"),
        ("warmup", 1, "rounds before them"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
