"""Text from JSON lines to shards: ours against tokenizers alone and Megatron-LM's tool on the same input, interleaved.

Times are CPU seconds of all processes, so they say what a core does. What a tool takes for a single line, which is
mostly imports, is measured too and shown apart. All must give the same ids. Ratios are a tool's time over ours, so
above 1 we are faster; for the tokenizer alone 0.95 says that ours reaches 95 % of its speed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from benchmarks.contestants.text_tools import TextTool

NAMES = ("ours", "tokenizer", "sentencepiece", "megatron-lm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed pass."""

    contestant: str
    round: int
    cpu_seconds: float
    """Of all processes of the tool."""
    start_cpu_seconds: float
    """Of a pass over a single line, in the same round."""
    wall_seconds: float
    """With its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What is tokenized."""

    path: Path
    """JSON lines."""
    documents: int
    """Lines."""
    bytes: int
    """Of UTF-8 text."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    if arguments.rounds < 1 or arguments.megabytes <= 0 or (arguments.document_bytes or 1) < 1:
        raise ValueError("--rounds, --megabytes, --document-bytes: must be above 0")
    if arguments.contestants is None:
        arguments.contestants = [name for name in NAMES if name != "megatron-lm" or arguments.megatron_lm]
    if "ours" not in arguments.contestants:
        raise ValueError("--contestants: must hold ours, which ratios are against")
    import torch

    from benchmarks.contestants.text_tools import build_tools
    from benchmarks.machine import describe_machine
    from megachameleon.files import write_text

    torch.set_num_threads(1)
    machine = describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        source = find_input(arguments, Path(temporary))
        tokenizer = find_tokenizer(arguments, source, Path(temporary))
        tools = build_tools(arguments.contestants, tokenizer, arguments.megatron_lm)
        samples, num_ids = measure(tools, source, arguments.rounds, Path(temporary))
    rows = summarise(tools, samples, source, num_ids)
    print_rows(rows, source, num_ids)
    if arguments.output:
        about = {"command": [sys.executable, *sys.argv], "machine": machine, "arguments": vars(arguments)}
        found = {"input": asdict(source), "ids": num_ids, "rows": rows, "samples": list(map(asdict, samples))}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


def find_input(arguments: argparse.Namespace, temporary: Path) -> Input:
    """`--input`, or the standard library's sources."""
    from benchmarks.corpora import read_texts, write_library

    path = arguments.input
    if path is None:
        path = temporary / "library.jsonl"
        write_library(path, arguments.megabytes, arguments.document_bytes)
    texts = read_texts(path)
    return Input(path=path, documents=len(texts), bytes=sum(len(text.encode()) for text in texts))


def find_tokenizer(arguments: argparse.Namespace, source: Input, temporary: Path) -> Path:
    """`--tokenizer`, trained on the input first where the folder is not there yet."""
    from benchmarks.corpora import read_texts
    from megachameleon.tokens.text.training import train_text_tokenizer
    from megachameleon.tokens.vocabulary import Vocabulary

    folder: Path = arguments.tokenizer or temporary / "tokenizer"
    if not folder.exists():
        print(f"training a tokenizer of {arguments.vocab_size:,} ids on {source.path.name} ...", file=sys.stderr)
        fixed = Vocabulary.compact(num_text_ids=64, num_image_codes=8192, image_grid=(32, 32)).text_start
        vocabulary = Vocabulary.compact(
            num_text_ids=max(1, arguments.vocab_size - fixed), num_image_codes=8192, image_grid=(32, 32)
        )
        train_text_tokenizer(read_texts(source.path), vocabulary, folder)
    return folder


def measure(tools: "Mapping[str, TextTool]", source: Input, rounds: int, temporary: Path) -> tuple[list[Sample], int]:
    """Every contestant once a round, in an order that changes.

    Returns:
        Samples, and how many ids the text has.

    Raises:
        ValueError: two contestants give different ids.
    """
    import numpy as np

    from benchmarks.measuring import order_of

    first_line = temporary / "first_line.jsonl"
    with source.path.open(encoding="utf-8") as file:
        first_line.write_text(file.readline(), encoding="utf-8")
    samples, expected = [], None
    for number in range(rounds):
        for name in order_of(list(tools), number):
            # in the same round, because imports too depend on the load of the machine
            start = tools[name](first_line).cpu_seconds if tools[name].starts else 0.0
            done = tools[name](source.path)
            expected = done.ids if expected is None else expected
            if not np.array_equal(done.ids, expected):
                raise ValueError(f"--contestants: {name} gives other ids than those before it; their times say nothing")
            samples.append(
                Sample(
                    contestant=name,
                    round=number,
                    cpu_seconds=done.cpu_seconds,
                    start_cpu_seconds=start,
                    wall_seconds=done.wall_seconds,
                )
            )
    assert expected is not None
    return samples, len(expected)


def summarise(
    tools: "Mapping[str, TextTool]", samples: Sequence[Sample], source: Input, num_ids: int
) -> list[dict[str, Any]]:
    """One row a contestant; speeds and ratios are without the start, which is told beside them."""
    from benchmarks.measuring import Spread

    def of(name: str) -> list[Sample]:
        return sorted((sample for sample in samples if sample.contestant == name), key=lambda sample: sample.round)

    rows = []
    for name in tools:
        net = [sample.cpu_seconds - sample.start_cpu_seconds for sample in of(name)]
        gross = [sample.cpu_seconds for sample in of(name)]
        ours_net = [sample.cpu_seconds - sample.start_cpu_seconds for sample in of("ours")]
        ours_gross = [sample.cpu_seconds for sample in of("ours")]
        seconds = Spread.of(net)
        rows.append(
            {
                "name": name,
                "title": tools[name].title,
                "cpu_seconds": asdict(seconds),
                "start_cpu_seconds": asdict(Spread.of([sample.start_cpu_seconds for sample in of(name)])),
                "wall_seconds": asdict(Spread.of([sample.wall_seconds for sample in of(name)])),
                "documents_per_second": source.documents / seconds.median,
                "megabytes_per_second": source.bytes / 1e6 / seconds.median,
                "million_ids_per_second": num_ids / 1e6 / seconds.median,
                "ratio": asdict(Spread.of([a / b for a, b in zip(net, ours_net, strict=True)])),
                "ratio_with_start": asdict(Spread.of([a / b for a, b in zip(gross, ours_gross, strict=True)])),
            }
        )
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], source: Input, num_ids: int) -> None:
    """The table, and what each contestant is."""
    from rich import box
    from rich.table import Table

    from benchmarks.report import open_console

    caption = (
        f"{source.documents:,} documents, {source.bytes / 1e6:.1f} MB, {num_ids / 1e6:.2f} M ids; per second of CPU, "
        "without the start; ratio: time over ours; in brackets, quartiles"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("", "CPU s", "start s", "docs/s", "MB/s", "M ids/s", "ratio", "with start"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["name"],
            f"{row['cpu_seconds']['median']:.2f}",
            f"{row['start_cpu_seconds']['median']:.2f}",
            f"{row['documents_per_second']:,.0f}",
            f"{row['megabytes_per_second']:.2f}",
            f"{row['million_ids_per_second']:.2f}",
            f"{ratio['median']:.3f} [{ratio['low_quartile']:.3f} {ratio['high_quartile']:.3f}]",
            f"{row['ratio_with_start']['median']:.3f}",
        )
    console = open_console()
    console.print(table)
    for row in rows:
        console.print(f"{row['name']}: {row['title']}", highlight=False, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare text preprocessing: CPU time of all processes, on the same JSON lines and sentencepiece model.",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.text_preprocessing --tokenizer /tmp/tokenizer --output text.json
  git clone --depth 1 --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
  pip install einops six triton      # what its tool imports
  python -m benchmarks.text_preprocessing --megatron-lm Megatron-LM --document-bytes 2000

Without --input, the text is the sources of Python's standard library; without --tokenizer, or where its folder does not
exist yet, one is trained on the text.""",
    )
    add = parser.add_argument
    add("--contestants", nargs="+", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)} (all that can run)")
    add("--megatron-lm", type=Path, metavar="FOLDER", help="a checkout of Megatron-LM")
    add("--input", type=Path, metavar="FILE.jsonl", help='lines of {"text": ...}')
    add("--megabytes", type=float, default=12.0, help="of the standard library (%(default)s)")
    add("--document-bytes", type=int, metavar="N", help="cut its files into documents of about N bytes (whole files)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="of a sentencepiece tokenizer, made if it does not exist")
    add("--vocab-size", type=int, default=65536, metavar="N", help="ids of a new tokenizer (%(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
