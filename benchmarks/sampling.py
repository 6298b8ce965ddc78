"""Reading training samples from page cache, ours against megatron-core's GPTDataset and BlendedDataset, interleaved.

Every contestant reads batches of 8 samples from the same shards, in one thread. Ours checks each sample's CRC-32 and
gives document and modality boundaries; megatron gives tokens, labels, loss mask and positions, and with `-documents` it
resets positions and masks the loss at the ends of documents. Ratios are CPU times over ours: above 1 we are faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from benchmarks.measuring import Timing

NAMES = ("ours", "ours-continuous", "megatron", "megatron-documents")


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    if arguments.start_in:
        print(json.dumps(measure_start(arguments.start_in, arguments.sequence_length)))
        return
    import torch

    from benchmarks.machine import describe_machine
    from megachameleon.files import write_text

    # speeds are of one core
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        start = start_at_scale(Path(name), arguments) if arguments.shards else None
        timings = measure(arguments, Path(name))
    rows = summarise(timings, arguments)
    print_rows(rows, start)
    if arguments.output:
        about = {"command": [sys.executable, *sys.argv], "machine": describe_machine(torch.device("cpu"))}
        found = {"rows": rows, "start": start, "samples": list(map(asdict, timings))}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


def measure(arguments: argparse.Namespace, folder: Path) -> "list[Timing]":
    """Every contestant in this process, on the same shards."""
    import torch

    from benchmarks.contestants.samplers import build_reader, write_data
    from benchmarks.measuring import Plan, interleave
    from benchmarks.parking import Parking

    write_data(folder, arguments.tokens, arguments.sequence_length)
    parking = Parking(torch.device("cpu"), enabled=False)
    readers = {}
    for name in arguments.contestants:
        with parking.building(name):
            readers[name] = build_reader(name, folder, arguments.sequence_length, arguments.samples)
    plan = Plan(rounds=arguments.rounds, warmup=2, steps_per_turn=1, settle=0)
    return interleave(readers, plan, torch.device("cpu"), parking)


def start_at_scale(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start a run over datasets of so many shards, whose indices are made up, in a fresh process."""
    from dataclasses import replace

    from benchmarks.contestants.samplers import write_data
    from megachameleon.data.packing.pack_index import PackIndex, ShardEntry, index_path, write_index

    length, count = arguments.sequence_length, arguments.shards
    write_data(folder / "one", 20 * length, length)
    summary = PackIndex(index_path(folder / "one" / "interleaved", "best_fit", length)).summary
    strata = [0, 0, 0, 100, 0, 0, 0, 300, 0, 0, 0, 0, 700, 500, 0, 0]
    entries = [ShardEntry(f"unit_{number:06d}", "0" * 32, strata) for number in range(count)]
    samples = count * sum(strata)
    totals = {"tokens": 4000 * samples, "labels": 3990 * samples, "image_labels": 2500 * samples}
    total = replace(summary, shards=count, strata=[count * number for number in strata], **totals)
    first = folder / "start" / "00" / index_path(folder, "best_fit", length).name
    write_index(first, total, entries)
    for number in range(1, arguments.datasets):
        other = folder / "start" / f"{number:02d}" / first.name
        other.parent.mkdir()
        # one file under many names: 64 of them would fill disk and page cache
        other.hardlink_to(first)
    command = [sys.executable, "-m", "benchmarks.sampling", "--sequence-length", str(length)]
    done = subprocess.run(
        [*command, "--start-in", str(folder / "start")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout)


def measure_start(folder: Path, sequence_length: int) -> dict[str, Any]:
    """Open all datasets below `folder`, blend them, and look up samples."""
    import time

    from benchmarks.resident import resident_bytes
    from megachameleon.data.blending.blending import BlendedSamples
    from megachameleon.data.blending.mixture import Stage
    from megachameleon.data.packing.packed import open_packed

    before, wall, cpu = resident_bytes() or 0, time.perf_counter(), time.process_time()
    # checked=0, for the shards behind these indices do not exist
    datasets = {p.name: open_packed([p], sequence_length, "best_fit", checked=0) for p in sorted(folder.iterdir())}
    stages = [Stage(10**9, dict.fromkeys(datasets, 1.0), "tokens"), Stage(None, dict.fromkeys(datasets, 1.0))]
    blend = BlendedSamples.of(datasets, stages, seed=1)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    growth = []
    # at three far places: memory must not grow with what has been looked up
    for million in range(3):
        for position in range(million * 10**9, million * 10**9 + 20_000):
            draw = blend.blend[position]
            source, strata = datasets[draw.dataset].sources[0], datasets[draw.dataset].strata
            stratum, ordinal = 0, draw.index
            # by hand, as `PackedDataset` does, but without opening a shard
            while ordinal >= strata[stratum]:
                stratum, ordinal = stratum + 1, ordinal - strata[stratum]
            source.index.find(stratum, ordinal)  # type: ignore[attr-defined]
        growth.append((resident_bytes() or 0) - before)
    return {
        "datasets": len(datasets),
        "shards": sum(dataset.summary.shards for dataset in datasets.values()),
        "samples": sum(map(len, datasets.values())),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "resident_bytes_after_20000_40000_60000_samples": growth,
    }


def summarise(timings: "Sequence[Timing]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a contestant."""
    from benchmarks.measuring import Spread, by_round, ratios

    rows = []
    for name in arguments.contestants:
        seconds = by_round(timings, name, lambda timing: timing.cpu_seconds)
        tokens = arguments.samples * arguments.sequence_length
        against = list(ratios(timings, name, arguments.contestants[0], lambda timing: timing.cpu_seconds))
        rate = Spread.of([tokens / second / 1e6 for second in seconds])
        rows.append({"name": name, "million_tokens_per_cpu_second": asdict(rate), "ratio": asdict(Spread.of(against))})
    return rows


def print_rows(rows: Sequence[dict[str, Any]], start: dict[str, Any] | None) -> None:
    """The findings as text."""
    print(f"{'':<20} {'million tokens / CPU second':>34} {'its CPU time over the first':>32}")
    for row in rows:
        rate, ratio = row["million_tokens_per_cpu_second"], row["ratio"]
        print(
            f"{row['name']:<20} {rate['median']:>18.1f} [{rate['low_quartile']:.1f} {rate['high_quartile']:.1f}]"
            f" {ratio['median']:>18.2f} [{ratio['low_quartile']:.2f} {ratio['high_quartile']:.2f}]"
        )
    if start:
        grown = ", ".join(f"{size / 1e6:.0f}" for size in start["resident_bytes_after_20000_40000_60000_samples"])
        print(
            f"start: {start['samples']:,} samples of {start['shards']:,} shards in {start['datasets']} datasets: "
            f"{start['seconds']:.2f} s ({start['cpu_seconds']:.2f} s CPU); {grown} MB resident after 20,000, 40,000 "
            "and 60,000 look-ups"
        )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        __doc__ or "",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.sampling --output sampling.json
  OMP_NUM_THREADS=1 python -m benchmarks.sampling --shards 0 --rounds 21    # reading only""",
    )
    add = parser.add_argument
    add("--contestants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    add("--tokens", type=int, default=20_000_000, help="of each of three datasets (default %(default)s)")
    add("--sequence-length", type=int, default=4096, help="(default %(default)s)")
    add("--samples", type=int, default=256, help="of a turn, a multiple of 8 (default %(default)s)")
    add("--rounds", type=int, default=12, help="that count (default %(default)s)")
    add("--datasets", type=int, default=64, help="of the simulated start (default %(default)s)")
    add("--shards", type=int, default=100_000, help="of each of these (default %(default)s); 0 leaves it out")
    add("--folder", type=Path, help="where data is written, and removed (default: the system's)")
    add("--start-in", type=Path, help=argparse.SUPPRESS)
    add("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
