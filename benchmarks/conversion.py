"""Converting checkpoints against plain copying of the same bytes, interleaved, and the memory that it takes.

A synthetic checkpoint of a real model's shape, with few layers, is converted in every direction. In each round, whose
order changes, every direction has a turn and so has copying of every source: file after file, each made durable, as
converted ones are. All turns read the same source; what others have written is on the disk before a turn begins.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser, track

if TYPE_CHECKING:
    from megachameleon.checkpoint.formats.registry import Options

KINDS = ("megatron", "hf", "meta")
DIRECTIONS = tuple(f"{one}-{other}" for one in KINDS for other in KINDS)
COPY = "copy"
LOOK_EVERY = 0.005
"""Seconds between looks at memory."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One conversion, or one copy."""

    layers: int
    """Of the model that was converted."""
    workers: int
    """0: a copy, which has none."""
    name: str
    """A direction, such as `hf-meta`, or `copy-` and a format."""
    round: int
    seconds: float
    """Wall time."""
    num_bytes: int
    """Written."""
    peak_bytes: int
    """Private memory of the process (anonymous pages; mapped files do not count) above that before the first turn, so
    what the allocator keeps from one turn for the next counts too."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    for name in ("rounds", "tensor_parallel", "shard_size"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be more than 0")
    if min(*arguments.layers, *arguments.workers) < 1:
        raise ValueError("--layers, --workers: must be at least 1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the tool does
    import torch

    from benchmarks.drawn_checkpoints import shape_of
    from benchmarks.machine import describe_machine
    from benchmarks.resident import private_bytes
    from megachameleon.files import write_text

    shape_of(arguments.preset, 1)  # all is imported before memory is looked at
    turns: list[Turn] = []
    before = private_bytes() or 0
    machine = describe_machine(torch.device("cpu"))
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="conversion-", dir=arguments.folder) as folder:
            bench = Bench(arguments, layers, Path(folder), before)
            turns += bench.measure(arguments.rounds)
            rows += summarise(turns, layers, bench.largest_tensor)
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]:.1f} at the start")
    print_rows(rows, arguments)
    if arguments.output:
        about = {"command": [sys.executable, *sys.argv], "machine": machine, "arguments": vars(arguments)}
        found = {"rows": rows, "turns": list(map(asdict, turns))}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


class Bench:
    """Checkpoints of all formats that are read, and turns with them."""

    def __init__(self, arguments: argparse.Namespace, layers: int, folder: Path, before: int) -> None:
        from benchmarks.drawn_checkpoints import draw_checkpoint, shape_of
        from megachameleon.checkpoint.formats.plain import plain_shapes

        self.arguments, self.layers, self.folder, self.before = arguments, layers, folder, before
        model = shape_of(arguments.preset, layers)
        self.largest_tensor = 2 * max(a * b for a, b in (s for s in plain_shapes(model).values() if len(s) == 2))
        for kind in track(sorted({name.partition("-")[0] for name in arguments.directions}), "drawing"):
            draw_checkpoint(kind, model, folder / kind, self._options(source=True))

    def measure(self, rounds: int) -> list[Turn]:
        """All turns; those of a round before the first do not count."""
        from benchmarks.measuring import order_of

        directions = [(name, workers) for workers in self.arguments.workers for name in self.arguments.directions]
        copies = sorted({f"{COPY}-{name.partition('-')[0]}" for name in self.arguments.directions})
        todo = {f"{name} {workers}": (name, workers) for name, workers in directions} | {c: (c, 0) for c in copies}
        found = []
        for number in track(range(rounds + 1), f"rounds, {self.layers} layers"):
            for key in order_of(list(todo), number):
                turn = self._turn(*todo[key], number)
                # the first round warms the page cache and the allocator
                found += [turn] if number else []
        return found

    def _turn(self, name: str, workers: int, number: int) -> Turn:
        one, other = name.split("-")
        source, target = self.folder / (other if one == COPY else one), self.folder / "target"
        # what the turn before has written must not be flushed in this one's time
        os.sync()
        if self.arguments.cold:
            forget(source)
        with watched_memory(self.before) as peak:
            start = time.perf_counter()
            if one == COPY:
                copy_durably(source, target)
            else:
                self._convert(one, other, source, target, workers)
            seconds = time.perf_counter() - start
        num_bytes = sum(path.stat().st_size for path in files_of(target))
        shutil.rmtree(target)
        return Turn(
            layers=self.layers,
            workers=workers,
            name=name,
            round=number,
            seconds=seconds,
            num_bytes=num_bytes,
            peak_bytes=peak[0],
        )

    def _convert(self, one: Any, other: Any, source: Path, target: Path, workers: int) -> None:
        from megachameleon.checkpoint.formats.conversion import convert
        from megachameleon.checkpoint.formats.registry import make_sink, open_source

        options = self._options(source=False)
        opened = open_source(one, source, options)
        convert(opened, make_sink(other, opened.description, options, opened), target, workers=workers)

    def _options(self, *, source: bool) -> "Options":
        """Our own files are cut otherwise than they were, so that tensors have to be put together."""
        from megachameleon.checkpoint.formats.registry import Options

        ranks = self.arguments.tensor_parallel
        return Options(
            tensor_parallel=ranks if source else max(ranks // 2, 1), shard_bytes=int(self.arguments.shard_size * GB)
        )


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy_durably(source: Path, target: Path) -> None:
    """Plain copying of a folder, one file after the other, each written to the disk before the next."""
    for path in files_of(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
        with copied.open("rb") as file:
            # converted files are durable, so copied ones have to be
            os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that they are read from the disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def watched_memory(before: int) -> Iterator[list[int]]:
    """The peak of private memory above `before`, in bytes, once the block is left."""
    from benchmarks.resident import private_bytes

    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_EVERY):
            peak[0] = max(peak[0], (private_bytes() or 0) - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def summarise(turns: Sequence[Turn], layers: int, largest_tensor: int) -> list[dict[str, Any]]:
    """One row a direction and number of workers, and one a copy."""
    from benchmarks.measuring import Spread

    here = [turn for turn in turns if turn.layers == layers]
    copies = {(turn.name, turn.round): _speed(turn) for turn in here if not turn.workers}
    rows = []
    for name, workers in dict.fromkeys((turn.name, turn.workers) for turn in here):
        own = [turn for turn in here if (turn.name, turn.workers) == (name, workers)]
        reference = name if not workers else f"{COPY}-{name.partition('-')[0]}"
        rows.append(
            {
                "layers": layers,
                "name": name,
                "workers": workers,
                "gigabytes": own[0].num_bytes / GB,
                "megabytes_per_second": asdict(Spread.of([_speed(turn) / 1e6 for turn in own])),
                "ratio": asdict(Spread.of([_speed(turn) / copies[reference, turn.round] for turn in own])),
                "peak_gigabytes": max(turn.peak_bytes for turn in own) / GB,
                "largest_tensor_gigabytes": largest_tensor / GB,
            }
        )
    return sorted(rows, key=lambda row: (not row["workers"], row["name"], row["workers"]))


def _speed(turn: Turn) -> float:
    return turn.num_bytes / turn.seconds


def print_rows(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """The table."""
    from rich import box
    from rich.table import Table

    from benchmarks.report import open_console

    state = "read from the disk" if arguments.cold else "in the page cache"
    caption = (
        f"{arguments.preset}, bf16, source {state}; medians of {arguments.rounds} rounds, in brackets least and most; "
        "ratio: speed over that of copying the source in the same round; memory: private, at its peak, in GB, and each "
        "worker's share as a multiple of the largest tensor"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("", "layers", "workers", "GB", "MB/s", "ratio", "memory", "of largest"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        speed, ratio = row["megabytes_per_second"], row["ratio"]
        peak = row["peak_gigabytes"] / row["largest_tensor_gigabytes"] / max(row["workers"], 1)
        table.add_row(
            row["name"],
            str(row["layers"]),
            str(row["workers"] or ""),
            f"{row['gigabytes']:.2f}",
            f"{speed['median']:,.0f} [{speed['least']:,.0f} {speed['most']:,.0f}]",
            f"{ratio['median']:.2f} [{ratio['least']:.2f} {ratio['most']:.2f}]",
            f"{row['peak_gigabytes']:.2f}",
            f"{peak:.2f}" if row["workers"] else "",
        )
    open_console().print(table)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare converting checkpoints with plain copying of the same bytes, and measure its memory.",
        """\
  python -m benchmarks.conversion
  python -m benchmarks.conversion --preset chameleon_34b --folder /scratch --rounds 5 --output conversion.json
  # memory does not grow with the number of layers
  python -m benchmarks.conversion --preset chameleon_34b --layers 1 2 4 --rounds 1 --directions megatron-hf

Files are drawn, and deleted afterwards; there must be room for one checkpoint a format that is read, and one more.""",
    )
    parser.add_argument("--preset", default="chameleon_7b", help="whose shape the model has (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2], metavar="N", help="(2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], metavar="N", help="(2)")
    parser.add_argument(
        "--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), metavar="A-B", help="(all nine)"
    )
    parser.add_argument("--folder", type=Path, help="on the file system to be measured (default: for temporary files)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--cold", action="store_true", help="sources are read from the disk, not from the page cache")
    parser.add_argument(
        "--tensor-parallel", type=int, default=4, metavar="N", help="files of a megatron source (%(default)s)"
    )
    parser.add_argument("--shard-size", type=float, default=0.5, metavar="GB", help="largest file of hf (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every turn")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
