"""The head with its loss: ours against megatron-core's output layer and cross entropy, interleaved.

A step is the linear forward, the loss, the backward pass of both, and adding the gradient of the weight to an fp32
`main_grad`. Ratios are ours over theirs, so below 1 we are better.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from benchmarks.contestants.heads import Head
    from benchmarks.measuring import Timing

NAMES = ("ours", "megatron-z", "megatron")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process found."""

    timings: "list[Timing]"
    """Every step that counts."""
    first_losses: dict[str, float]
    """By contestant, nats per token."""
    resident_bytes: int | None
    """With a single contestant on the CPU: what its first step needed beyond weights, gradients and inputs."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    for name in ("tokens", "hidden", "vocab", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: {getattr(arguments, name)} must be at least 1")
    if arguments.warmup < 0 or (arguments.threads or 1) < 1:
        raise ValueError(f"--warmup {arguments.warmup}, --threads {arguments.threads}: must not be negative")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch

    from benchmarks.machine import describe_machine
    from megachameleon.config import ParallelConfig
    from megachameleon.files import write_text
    from megachameleon.parallel.context import parallel_context

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with parallel_context(ParallelConfig()) as context:
        machine = describe_machine(context.device)
        on_gpu = context.device.type == "cuda"
        if arguments.memory and on_gpu:
            raise ValueError("--memory: is for the CPU; on a GPU memory is measured in every run")
        memory = measure_memory(arguments.contestants) if arguments.memory else {}
        measured = measure(arguments, context)
    rows = summarise(arguments.contestants, measured, memory, on_gpu=on_gpu)
    print_rows(rows)
    if arguments.output:
        found = {
            "rows": rows,
            "resident_bytes": measured.resident_bytes,
            "samples": list(map(asdict, measured.timings)),
        }
        about = {"command": [sys.executable, *sys.argv], "machine": machine, "arguments": {**vars(arguments)}}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


def measure(arguments: argparse.Namespace, context: Any) -> Measured:
    """Every contestant in this process, on the same inputs."""
    from benchmarks.contestants.heads import build_head
    from benchmarks.measuring import Plan, interleave
    from benchmarks.parking import Parking
    from benchmarks.resident import forget_peak, peak_resident_bytes, resident_bytes

    parking = Parking(context.device, enabled=False)
    heads: dict[str, Head] = {}
    for name in arguments.contestants:
        with parking.building(name):
            heads[name] = build_head(name, arguments, context)
    before, counted = resident_bytes(), forget_peak()
    losses = {name: head.step(0) for name, head in heads.items()}
    peak = peak_resident_bytes()
    alone = len(heads) == 1 and counted and before is not None and peak is not None
    if len(heads) > 1:
        require_same(heads, losses)
    plan = Plan(rounds=arguments.rounds, warmup=arguments.warmup, steps_per_turn=1, settle=0)
    timings = interleave(heads, plan, context.device, parking)
    return Measured(timings=timings, first_losses=losses, resident_bytes=peak - before if alone else None)


def measure_memory(names: Sequence[str]) -> dict[str, int | None]:
    """Extra memory of each contestant's first step, each in a fresh process."""
    from benchmarks.machine import PROJECT

    found: dict[str, int | None] = {}
    # or each would start processes of its own, without end
    kept = [argument for argument in sys.argv[1:] if argument != "--memory"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "one.json"
            own = ["--contestants", name, "--rounds", "1", "--warmup", "0", "--output", str(output)]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.head", *kept, *own],
                cwd=PROJECT,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found[name] = json.loads(output.read_text(encoding="utf-8"))["resident_bytes"]
    return found


def require_same(heads: "dict[str, Head]", losses: dict[str, float]) -> None:
    """Refuse to compare heads that do not compute the same.

    Raises:
        ValueError: losses or gradients differ by more than rounding explains.
    """
    first, *others = heads
    for name in others:
        pairs = [(losses[name], losses[first])]
        for theirs, ours in zip(heads[name].gradient_norms(), heads[first].gradient_norms(), strict=True):
            pairs.append((theirs, ours))
        # rounding to bf16 alone is up to 0.4 % a value
        if any(abs(theirs / ours - 1) > 0.02 for theirs, ours in pairs):
            raise ValueError(f"--contestants: {name} computes another loss or gradient than {first}: {pairs}")


def summarise(
    names: Sequence[str], measured: Measured, memory: dict[str, int | None], *, on_gpu: bool
) -> list[dict[str, Any]]:
    """One row a contestant; ratios are the first one's over its own."""
    from benchmarks.measuring import Spread, by_round, ratios

    def seconds(timing: "Timing") -> float:
        # CPU time hardly sees other processes; on a GPU it says nothing
        return timing.wall_seconds if on_gpu else timing.cpu_seconds

    rows = []
    for name in names:
        peaks = [t.peak_bytes for t in measured.timings if t.contestant == name and t.peak_bytes is not None]
        rows.append(
            {
                "name": name,
                "seconds": asdict(Spread.of(by_round(measured.timings, name, seconds))),
                "ratio": asdict(Spread.of(list(ratios(measured.timings, names[0], name, seconds)))),
                "extra_bytes": max(peaks) if peaks else memory.get(name),
                "first_loss": measured.first_losses[name],
            }
        )
    for row in rows:
        own, first = row["extra_bytes"], rows[0]["extra_bytes"]
        row["memory_ratio"] = first / own if own and first else None
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    from rich import box
    from rich.table import Table

    from benchmarks.report import open_console

    table = Table(box=box.SIMPLE_HEAD, caption=f"ratios: {rows[0]['name']} over it; in brackets, quartiles")
    for heading in ("", "ms / step", "ratio", "extra MiB", "ratio", "loss"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        time, ratio, extra = row["seconds"], row["ratio"], row["extra_bytes"]
        table.add_row(
            row["name"],
            f"{1e3 * time['median']:,.0f} [{1e3 * time['low_quartile']:,.0f} {1e3 * time['high_quartile']:,.0f}]",
            f"{ratio['median']:.3f} [{ratio['low_quartile']:.3f} {ratio['high_quartile']:.3f}]",
            "" if extra is None else f"{extra / MIB:,.0f}",
            "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}",
            f"{row['first_loss']:.5f}",
        )
    open_console().print(table)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare the head and its loss with megatron-core's.",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.head --threads 1 --memory --output head.json
  python -m benchmarks.head --tokens 8192 --hidden 4096 --rounds 30 --output h100.json

megatron: ColumnParallelLinear and vocab_parallel_cross_entropy. megatron-z: the same with a z-loss from a logsumexp of
its own. On the CPU times are those of the process; memory is what the first step of a fresh process adds.""",
    )
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=str(NAMES))
    for name, default in (("tokens", 2048), ("hidden", 512), ("vocab", 65536)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="that count (9)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of torch on the CPU (its own choice)")
    parser.add_argument("--memory", action="store_true", help="CPU: extra memory of each in a process of its own")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
