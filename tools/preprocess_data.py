"""Raw text and pictures into shards of token ids."""

import argparse
import os
import signal
import sys
from pathlib import Path

from megachameleon.console import run_tool, tool_parser

EXAMPLES = """\
  python tools/preprocess_data.py plan --input raw/pairs/ --output shards/pairs --tokenizer tokenizers/text \\
      --image-tokenizer tokenizers/image
  python tools/preprocess_data.py run --output shards/pairs --workers 4     # again after an interruption
  python tools/preprocess_data.py run --output shards/pairs --unit 7        # one job of an array
  python tools/preprocess_data.py status --output shards/pairs
  python tools/preprocess_data.py verify --output shards/pairs
  python tools/preprocess_data.py inspect shards/pairs --page pairs.html
  python tools/preprocess_data.py merge shards/pairs --prefix merged/pairs
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands.add_parser("plan", help="check and hash the inputs, freeze the units of work"))
    _add_run(commands.add_parser("run", help="make the shards of all unfinished units, or of one"))
    for name, text in (("status", "say where each unit stands"), ("verify", "read every shard again and compare")):
        _add_folder(commands.add_parser(name, help=text))
    inspect = commands.add_parser("inspect", help="count, and write a page that shows documents and pictures")
    inspect.add_argument("dataset", type=Path, nargs="+", help="folder of shards, or shards")
    inspect.add_argument("--page", "--output", dest="page", type=Path, help="HTML page to write")
    inspect.add_argument("--tokenizer", type=Path, help="default: the one in the folder's plan")
    inspect.add_argument("--image-tokenizer", type=Path, help="default: the one in the folder's plan")
    inspect.add_argument("--documents", type=int, default=24, help="how many to show (default %(default)s)")
    merge = commands.add_parser("merge", help="write one shard for megatron-core without this package")
    merge.add_argument("dataset", type=Path, nargs="+", help="folder of shards, or shards")
    merge.add_argument("--prefix", type=Path, required=True, help="path of the new shard, without suffix")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Do the one command."""
    commands = {"plan": plan, "run": run, "status": status, "verify": verify, "inspect": inspect, "merge": merge}
    commands[arguments.command](arguments)


def plan(arguments: argparse.Namespace) -> None:
    """Freeze the units of work."""
    from megachameleon.data.documents import DocumentOptions
    from megachameleon.data.preprocessing import plan_preprocessing

    options = DocumentOptions(
        picture_first=arguments.picture_first,
        captions=arguments.captions,
        languages=_languages(arguments.languages),
        seed=arguments.seed,
    )
    plan = plan_preprocessing(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        arguments.image_tokenizer,
        options,
        num_units=arguments.units,
        allow_damaged_archives=arguments.allow_damaged_archives,
        replace=arguments.replace,
    )
    inputs = [item for unit in plan.units for item in unit.inputs]
    print(
        f"{arguments.output}: {len(plan.units)} units from {len(inputs)} inputs, "
        f"{sum(item.bytes for item in inputs) / 1e6:,.1f} MB, {sum(item.num_pictures for item in inputs):,} pictures"
    )


def _languages(text: str | None) -> tuple[str, ...]:
    codes = () if text is None else tuple(code.strip() for code in text.split(","))
    if "" in codes:
        raise ValueError(f"--languages {text!r}: an empty code; give codes such as en,de, or leave it out for all")
    return codes


def run(arguments: argparse.Namespace) -> None:
    """Make shards."""
    from megachameleon.data.jobs import run_units
    from megachameleon.data.preprocessing import RunOptions

    threads = None if arguments.workers <= 1 else max(1, (os.cpu_count() or 1) // arguments.workers)
    options = RunOptions(
        max_bad=arguments.max_bad,
        code_cache=arguments.code_cache or arguments.output / "cache",
        device=arguments.device,
        num_threads=threads,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the workers too
    states = run_units(arguments.output, options, number=arguments.unit, workers=arguments.workers)
    status(arguments)
    chosen = states if arguments.unit is None else [states[arguments.unit]]
    if unfinished := sum(state.problem is not None for state in chosen):
        sys.exit(f"error: {unfinished} units are not finished; wait for the other run to end, then run again")


def status(arguments: argparse.Namespace) -> None:
    """Print where each unit stands."""
    from megachameleon.data.jobs import unit_states

    states = unit_states(arguments.output)
    for state in states:
        if state.manifest is None:
            print(f"{state.unit.name}: {state.problem}")
        else:
            m = state.manifest
            empty = "" if m.num_documents or m.filtered else " (its inputs hold no records)"
            set_aside = sum(m.quarantined.values())
            print(
                f"{state.unit.name}: {m.num_documents:,} documents, {m.num_text_tokens:,} ids of text, "
                f"{m.num_images:,} pictures{empty}" + (f", {set_aside:,} records set aside" if set_aside else "")
            )
    finished = sum(state.manifest is not None for state in states)
    print(f"{arguments.output}: {finished} of {len(states)} units are finished")


def verify(arguments: argparse.Namespace) -> None:
    """Read every shard again."""
    from megachameleon.data.jobs import verify_units

    verify_units(arguments.output)
    print(f"{arguments.output}: all shards are what their manifests say")


def inspect(arguments: argparse.Namespace) -> None:
    """Print counts and write a page."""
    from megachameleon.data.inspection import dataset_counts, write_page
    from megachameleon.data.plan import PLAN_FILE, Plan
    from megachameleon.data.preprocessing import load_tokenizers
    from megachameleon.data.shards import Dataset

    dataset = Dataset.open(arguments.dataset)
    for what, count in dataset_counts(dataset).items():
        print(f"{what:>24}  {count:,}")
    if arguments.page is None:
        return
    tokenizer, image_tokenizer = arguments.tokenizer, arguments.image_tokenizer
    if tokenizer is None:
        folder = arguments.dataset[0]
        if not (folder / PLAN_FILE).exists():
            raise ValueError(f"{folder}: has no plan that names its tokenizer; give --tokenizer")
        plan = Plan.load(folder)
        tokenizer = Path(plan.tokenizer)
        image_tokenizer = Path(plan.image_tokenizer) if plan.image_tokenizer else None
    write_page(
        dataset, *load_tokenizers(tokenizer, image_tokenizer, "cpu"), arguments.page, num_documents=arguments.documents
    )
    print(arguments.page)


def merge(arguments: argparse.Namespace) -> None:
    """Write one shard from several."""
    from megachameleon.data.jobs import merge_shards
    from megachameleon.data.shards import Dataset

    manifest = merge_shards(Dataset.open(arguments.dataset).shards, arguments.prefix)
    print(f"{arguments.prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} ids")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, help=".tar, .jsonl (plain or .gz), .txt, or folders of them")
    _add_folder(parser)
    add("--tokenizer", type=Path, required=True, help="folder of the text tokenizer")
    add("--image-tokenizer", type=Path, help="folder of the picture tokenizer")
    add("--picture-first", type=float, default=0.5, help="share of pictures before their caption (default %(default)s)")
    add("--captions", choices=["all", "first"], default="all", help="one document for each caption, or for the first")
    add("--languages", help="captions to keep, such as en,de (default: all)")
    add("--seed", type=int, default=0, help="of the order of picture and caption (default %(default)s)")
    add("--units", type=int, help="number of shards (default: one for each input)")
    add("--allow-damaged-archives", action="store_true", help="keep what comes before the damage")
    add("--replace", action="store_true", help="put this plan in the place of another one in OUTPUT")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_folder(parser)
    add("--unit", type=int, help="number of the one unit to run, from 0")
    add("--workers", type=int, default=1, help="processes (default %(default)s)")
    add("--max-bad", type=float, default=0.01, help="share of bad records that fails a unit (default %(default)s)")
    add("--code-cache", type=Path, help="folder of picture codes to share and keep (default: OUTPUT/cache)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where pictures are encoded")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder of plan and shards")


if __name__ == "__main__":
    run_tool(main, parser())
