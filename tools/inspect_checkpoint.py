#!/usr/bin/env python3
"""Say what a checkpoint of any format is, damaged or not, and how two of them differ; nothing in them is executed."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import progress_bar, run_tool, tool_parser

if TYPE_CHECKING:
    from rich.console import Console

    from megachameleon.checkpoint.inspection.report import Report

EXAMPLES = """\
  python tools/inspect_checkpoint.py runs/mine                       # a run's newest checkpoint
  python tools/inspect_checkpoint.py downloads/chameleon-30b --norms --picture norms.svg
  python tools/inspect_checkpoint.py downloads/meta/30b --check --hash
  python tools/inspect_checkpoint.py exported/mine --tensors '*.q_norm.*' --statistics
  python tools/inspect_checkpoint.py --diff downloads/meta/30b checkpoints/chameleon_34b
  python tools/inspect_checkpoint.py runs/mine --stored --tensors 'optimizer.exp_avg.*' --statistics
  python tools/inspect_checkpoint.py --diff before after --tolerance 1e-3 --json > difference.json

Formats: ours (run, checkpoints folder, one checkpoint, also set aside or unfinished), Hugging Face's (Chameleon,
Lumina's and anole's variants, Llama, others as plain tensors), Meta's, single .safetensors and .pth files.
Without --norms, --statistics, --hash, --check, --picture or --diff only headers are read.

Exit status: 0 whole, or equal; 1 damaged or incomplete, or different; 2 not a checkpoint, or bad usage."""
PICTURES = (".svg", ".png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a folder or a file")
    parser.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"), help="compare two, of whatever formats")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="--diff: tensors whose relative Frobenius distance is at most T are equal (default: to the bit)",
    )
    parser.add_argument("--norms", action="store_true", help="norms by layer and kind of tensor")
    parser.add_argument("--statistics", action="store_true", help="least, most, mean, zeros … of each tensor")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot norms into a .svg or .png file")
    parser.add_argument(
        "--hash", action="store_true", help="a hash of the weights, the same in every format and layout"
    )
    parser.add_argument("--check", action="store_true", help="compare files with the hashes that the checkpoint has")
    parser.add_argument(
        "--tensors", nargs="?", const="*", metavar="GLOB", help="list tensors, all or those whose name fits"
    )
    parser.add_argument(
        "--stored", action="store_true", help="names of tensors as in the files, the state of an optimizer among them"
    )
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="--diff: tensors to show (default %(default)s)"
    )
    parser.add_argument("--masters", action="store_true", help="of a bf16 run: its fp32 masters instead of its weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables, of all tensors and files")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Inspect or compare."""
    _require_sensible(arguments)
    return _compare(arguments) if arguments.diff else _inspect(arguments)


def _require_sensible(arguments: argparse.Namespace) -> None:
    if (arguments.path is None) == (arguments.diff is None):
        raise ValueError("PATH: give one checkpoint, or two with --diff A B")
    if arguments.diff:
        for option in ("norms", "statistics", "picture", "hash", "check", "tensors"):
            if getattr(arguments, option):
                raise ValueError(f"--{option}: says nothing about --diff; leave it out")
    elif arguments.tolerance:
        raise ValueError("--tolerance: is for --diff; leave it out")
    if not 0 <= arguments.tolerance < 1:
        raise ValueError(f"--tolerance {arguments.tolerance}: must be in [0, 1)")
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: must be at least 1")
    if arguments.picture and arguments.picture.suffix not in PICTURES:
        raise ValueError(f"--picture {arguments.picture}: must end in .svg or .png")


def _inspect(arguments: argparse.Namespace) -> int:
    from megachameleon.checkpoint.inspection.checking import check_files
    from megachameleon.checkpoint.inspection.opening import inspect
    from megachameleon.checkpoint.inspection.statistics import chosen, measure

    report = inspect(arguments.path)
    report.as_stored = arguments.stored
    if arguments.masters:
        report.take_masters()
    found: dict[str, Any] = {}
    if arguments.check:
        sizes = sum(file.num_bytes or 0 for file in report.files if file.digests)
        with progress_bar("comparing hashes (MB)", sizes // 1_000_000) as bar:
            found["check"] = check_files(report, lambda count: bar.advance(count / 1e6))
    names = chosen(report, arguments.tensors)
    numbers = arguments.norms or arguments.statistics or arguments.picture is not None
    measured = None
    if numbers or arguments.hash:
        read = list(report.tensors.infos) if arguments.hash else names
        sizes = sum(report.tensors.infos[name].num_bytes for name in read)
        with progress_bar("reading tensors (MB)", sizes // 1_000_000) as bar:
            measured = measure(
                report, names, lambda count: bar.advance(count / 1e6), numbers=numbers, content=arguments.hash
            )
        found |= measured.as_plain()
    if arguments.picture and measured:
        from megachameleon.checkpoint.inspection.picture import write_picture

        write_picture(arguments.picture, str(report.path), measured.norms)
    if arguments.json:
        print(json.dumps(report.as_plain() | found, indent=2))
    else:
        _print(arguments, report, measured, found)
    return 1 if report.problems else 0


def _print(arguments: argparse.Namespace, report: "Report", measured: Any, found: dict[str, Any]) -> None:
    from megachameleon.checkpoint.inspection.norms import print_norms, print_statistics, sort_norms
    from megachameleon.checkpoint.inspection.statistics import chosen
    from megachameleon.checkpoint.inspection.terminal import print_problems, print_report, print_tensors

    console = _console()
    print_report(report, console, found)
    if arguments.tensors:
        console.print()
        print_tensors([(name, report.tensors.infos[name]) for name in chosen(report, arguments.tensors)], console)
    if arguments.norms:
        console.print()
        print_norms(sort_norms(measured.norms), console)
    if arguments.statistics:
        console.print()
        print_statistics(measured.numbers, console)
    print_problems(report, console)


def _compare(arguments: argparse.Namespace) -> int:
    from megachameleon.checkpoint.inspection.difference import compare, total_bytes
    from megachameleon.checkpoint.inspection.opening import inspect
    from megachameleon.checkpoint.inspection.terminal_difference import print_difference

    one, other = (inspect(path) for path in arguments.diff)
    one.as_stored = other.as_stored = arguments.stored
    for report in (one, other) if arguments.masters else ():
        if report.masters is not None or one.masters is other.masters:  # one side may well be an export
            report.take_masters()
    with progress_bar("comparing (MB)", total_bytes(one, other) // 1_000_000) as bar:
        difference = compare(one, other, arguments.tolerance, bar)
    if arguments.json:
        print(json.dumps(difference.as_plain(), indent=2))
    else:
        print_difference(difference, arguments.top, _console())
    return 0 if difference.is_equal else 1


def _console() -> "Console":
    """As wide as the terminal; a file has room for names."""
    from rich.console import Console

    plain: Any = {"markup": False, "emoji": False}  # a tensor's name may have brackets, or be `:x:`
    terminal = Console(**plain)
    return terminal if terminal.is_terminal else Console(width=120, **plain)


if __name__ == "__main__":
    run_tool(main, parser())
