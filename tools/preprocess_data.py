"""Raw text and pictures into shards of token ids."""

import argparse
import signal
import sys
from pathlib import Path

from megachameleon.console import run_tool, tool_parser

EXAMPLES = """\
  python tools/preprocess_data.py plan --input raw/pairs/ --output shards/pairs --tokenizer tokenizers/text \\
      --image-tokenizer tokenizers/image --workers 8
  python tools/preprocess_data.py run --output shards/pairs --workers 8     # again after an interruption
  python tools/preprocess_data.py run --output shards/pairs --unit 7        # one unit
  python tools/preprocess_data.py run --output shards/pairs --task 3 --num-tasks 16    # one job of an array
  python tools/preprocess_data.py status --output shards/pairs
  python tools/preprocess_data.py verify --output shards/pairs --workers 8
  python tools/preprocess_data.py inspect shards/pairs --page pairs.html
  python tools/preprocess_data.py pack --output shards/pairs --sequence-length 4096 --workers 8    # large data only
  python tools/preprocess_data.py inspect --blend train.yaml --page blend.html    # what a run will see
  python tools/preprocess_data.py merge shards/pairs --prefix merged/pairs
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands.add_parser("plan", help="check and hash the inputs, freeze the units of work"))
    _add_run(commands.add_parser("run", help="make the shards of all unfinished units, of one, or of a job's share"))
    status = commands.add_parser("status", help="say where the units stand; exit status 1 unless all are finished")
    _add_folder(status)
    status.add_argument("--all", action="store_true", help="a line for every unit, finished ones too")
    verify = commands.add_parser("verify", help="read every shard again and compare; lists all problems")
    _add_folder(verify)
    verify.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    verify.add_argument(
        "--discard", action="store_true", help="remove the manifests of changed shards, for run to mend"
    )
    _add_inspect(commands.add_parser("inspect", help="count, and write a page that shows documents and pictures"))
    _add_pack(commands.add_parser("pack", help="lay documents into samples, so that runs on large data start at once"))
    merge = commands.add_parser("merge", help="write one shard for megatron-core without this package")
    merge.add_argument("dataset", type=Path, nargs="+", help="folder of shards, or shards")
    merge.add_argument("--prefix", type=Path, required=True, help="path of the new shard, without suffix")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Do the one command."""
    if arguments.command == "inspect" and arguments.blend is not None:
        return inspect_blend(arguments)
    commands = {"plan": plan, "run": run, "status": status, "verify": verify, "inspect": inspect, "merge": merge}
    return {**commands, "pack": pack}[arguments.command](arguments)


def plan(arguments: argparse.Namespace) -> None:
    """Freeze the units of work."""
    # inside the commands, here and below: --help and wrong flags are answered at once
    from megachameleon.data.documents import DocumentOptions
    from megachameleon.data.preprocessing.plan_making import UNKNOWN_REFERENCES, PlanOptions, plan_preprocessing

    options = DocumentOptions(
        picture_first=arguments.picture_first,
        captions=arguments.captions,
        languages=_languages(arguments.languages),
        seed=arguments.seed,
        exact_pictures=arguments.exact_pictures,
    )
    how = PlanOptions(
        num_units=arguments.units,
        unit_bytes=_bytes(arguments.unit_bytes),
        allow_damaged_archives=arguments.allow_damaged_archives,
        drop_duplicates=arguments.drop_duplicates,
    )
    plan = plan_preprocessing(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        arguments.image_tokenizer,
        options,
        how,
        workers=arguments.workers,
        replace_plan=arguments.replace,
    )
    inputs = [item for unit in plan.units() for item in unit.inputs]
    duplicates = sum(item.num_duplicates for item in inputs)
    print(
        f"{arguments.output}: {plan.num_units:,} units from {len(inputs):,} inputs, {plan.bytes / 1e6:,.1f} MB, "
        f"{sum(item.num_pictures for item in inputs):,} pictures"
        + (f", {duplicates:,} duplicates to leave out" if plan.drop_duplicates else "")
    )
    for item in inputs:
        if item.references == UNKNOWN_REFERENCES:
            print(f"{plan.input_path(item)}: damaged; only what comes before the damage is kept")


def _languages(text: str | None) -> tuple[str, ...]:
    codes = () if text is None else tuple(code.strip() for code in text.split(","))
    if "" in codes:
        raise ValueError(f"--languages {text!r}: an empty code; give codes such as en,de, or leave it out for all")
    return codes


def _bytes(text: str | None) -> int | None:
    """`512M` is 512 million."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"--unit-bytes {text!r}: give a number such as 500000, 512M or 2G") from None


def run(arguments: argparse.Namespace) -> None:
    """Make shards."""
    from megachameleon.data.preprocessing.jobs import RunOptions, run_units
    from megachameleon.data.preprocessing.unit_report import report_lines

    if (arguments.task is None) != (arguments.num_tasks is None):
        raise ValueError("--task and --num-tasks: give both or neither")
    if arguments.unit is not None and arguments.task is not None:
        raise ValueError("--unit and --task: give one of them")
    if missing := [folder for folder in arguments.read_cache if not folder.is_dir()]:
        raise ValueError(f"--read-cache {missing[0]}: no such folder; check the path, or leave it out")
    options = RunOptions(
        workers=arguments.workers,
        max_bad=arguments.max_bad,
        # the first one is added to
        code_caches=(arguments.code_cache or arguments.output / "cache", *arguments.read_cache),
        device=arguments.device,
        num_threads=arguments.threads,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the workers too
    task = None if arguments.task is None else (arguments.task, arguments.num_tasks)
    result = run_units(arguments.output, options, number=arguments.unit, task=task)
    if result.pictures.pictures:
        print(f"{result.pictures.encoded:,} pictures encoded, {result.pictures.cached:,} found in the cache")
    print("\n".join(report_lines(arguments.output, result.states)))
    if unfinished := sum(state.problem is not None for state in result.states):
        sys.exit(f"error: {unfinished} units are not finished; wait for the other run to end, then run again")


def status(arguments: argparse.Namespace) -> None:
    """Print where the units stand."""
    from megachameleon.data.plan import load_plan
    from megachameleon.data.preprocessing.unit_report import report_lines
    from megachameleon.data.preprocessing.unit_state import unit_states

    states = list(unit_states(load_plan(arguments.output)))
    print("\n".join(report_lines(arguments.output, states, every=arguments.all)))
    if any(state.problem for state in states):
        sys.exit(1)


def verify(arguments: argparse.Namespace) -> None:
    """Read every shard again."""
    from megachameleon.data.packing.packing_job import verify_packs
    from megachameleon.data.preprocessing.verification import verify_units

    problems = verify_units(arguments.output, workers=arguments.workers, discard=arguments.discard)
    # after the shards, whose manifests packs are compared with
    problems += verify_packs(arguments.output)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(f"error: {arguments.output}: {len(problems):,} units are not what they should be")
    print(f"{arguments.output}: all shards are what their manifests say")


def inspect(arguments: argparse.Namespace) -> None:
    """Print counts and write a page."""
    from megachameleon.data.inspection import dataset_counts, write_page
    from megachameleon.data.plan import PLAN_FILE, load_plan
    from megachameleon.data.preprocessing.tokenizer_pair import load_tokenizers
    from megachameleon.data.shards.reader import Dataset

    if not arguments.dataset:
        raise ValueError("inspect: name a folder of shards, or a run's configuration (--blend CONFIG)")
    dataset = Dataset.open(list(map(Path, arguments.dataset)))
    for what, count in dataset_counts(dataset).items():
        print(f"{what:>24}  {count:,}")
    if arguments.page is None:
        return
    tokenizer, image_tokenizer = arguments.tokenizer, arguments.image_tokenizer
    if tokenizer is None:
        folder = Path(arguments.dataset[0])
        if not (folder / PLAN_FILE).exists():
            raise ValueError(f"{folder}: has no plan that names its tokenizer; give --tokenizer")
        plan = load_plan(folder)
        tokenizer = Path(plan.tokenizer)
        image_tokenizer = Path(plan.image_tokenizer) if plan.image_tokenizer else None
    write_page(
        dataset, *load_tokenizers(tokenizer, image_tokenizer, "cpu"), arguments.page, num_documents=arguments.documents
    )
    print(arguments.page)


def inspect_blend(arguments: argparse.Namespace) -> None:
    """Print what a run will see, and write it as a page."""
    from megachameleon.config import load_config
    from megachameleon.data.blending.blending import BlendedSamples
    from megachameleon.data.blending.forecast import describe, describe_position, forecast
    from megachameleon.data.blending.forecast_page import write_forecast_page
    from megachameleon.training.batches import open_data, require_enough_samples

    config = load_config(arguments.blend, arguments.dataset)
    if config.data.order == "megatron":
        raise ValueError("data.order: megatron; --blend can tell what a run sees only for data.order=blend")
    data = open_data(config.data, config.training)
    require_enough_samples(data, config.training, done=0, consumed=0)
    assert isinstance(data.train, BlendedSamples)
    num_samples = config.training.num_steps * config.training.global_batch_size
    if arguments.position is not None:
        print(describe_position(data.train, arguments.position, num_samples))
        return
    stages = forecast(data.train, num_samples, config.training.global_batch_size)
    print(describe(data.train, stages))
    if arguments.page is not None:
        write_forecast_page(data.train, stages, arguments.page, str(arguments.blend))
        print(arguments.page)


def pack(arguments: argparse.Namespace) -> None:
    """Lay documents into samples."""
    from megachameleon.data.packing.packing_job import pack_folder

    summary = pack_folder(
        arguments.output, arguments.sequence_length, arguments.packing, unit=arguments.unit, workers=arguments.workers
    )
    fill = summary.tokens / (summary.samples * (summary.sequence_length + 1))
    print(
        f"{arguments.output}: {summary.shards:,} shards, {summary.documents:,} documents, {summary.tokens:,} ids in "
        f"{summary.samples:,} samples ({fill:.1%} filled, {summary.mode})"
    )


def merge(arguments: argparse.Namespace) -> None:
    """Write one shard from several."""
    from megachameleon.data.shards.merging import merge_shards
    from megachameleon.data.shards.reader import Dataset

    manifest = merge_shards(Dataset.open(arguments.dataset).shards, arguments.prefix)
    print(f"{arguments.prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} ids")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders, patterns, or URLs that fsspec knows (s3://...)")
    _add_folder(parser)
    add("--tokenizer", type=Path, required=True, help="folder of the text tokenizer")
    add("--image-tokenizer", type=Path, help="folder of the picture tokenizer")
    add("--picture-first", type=float, default=0.5, help="share of pictures before their caption (default %(default)s)")
    add("--captions", choices=["all", "first"], default="all", help="one document for each caption, or for the first")
    add("--languages", help="captions to keep, such as en,de (default: all)")
    add("--seed", type=int, default=0, help="of the order of picture and caption (default %(default)s)")
    add("--exact-pictures", action="store_true", help="prepare pictures with Pillow alone: the exact pixels, slower")
    add("--drop-duplicates", action="store_true", help="leave out documents that an earlier one equals, over all units")
    add("--units", type=int, help="number of shards (default: one for each input; groups of 256 MB above 1000 inputs)")
    add("--unit-bytes", help="or: neighbouring inputs of at least so many bytes a shard, such as 2G")
    add("--allow-damaged-archives", action="store_true", help="keep what comes before the damage")
    add("--workers", type=int, default=1, help="processes that read the inputs (default %(default)s)")
    add("--replace", action="store_true", help="put this plan in the place of another one in OUTPUT")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_folder(parser)
    add("--unit", type=int, help="number of the one unit to run, from 0")
    add("--task", type=int, help="number of this job, from 0: it does every NUM_TASKS-th unit")
    add("--num-tasks", type=int, help="how many jobs share the units")
    add("--workers", type=int, default=1, help="processes that tokenize and decode (default %(default)s)")
    bad = "share of bad records that fails a unit with more than ten; 0: the first fails it (default %(default)s)"
    add("--max-bad", type=float, default=0.01, help=bad)
    add("--code-cache", type=Path, help="folder of picture codes to keep, on a local disk (default: OUTPUT/cache)")
    add("--read-cache", type=Path, action="append", default=[], help="further caches, only read; may be repeated")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where pictures are encoded")
    add(
        "--threads",
        type=int,
        help="threads that encode pictures on the CPU, each another one (default: PyTorch's number, at most 16)",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", nargs="*", help="folder of shards, or shards; with --blend: overrides, key.sub=value")
    add("--blend", metavar="CONFIG", help="say what a run will see: tokens and pictures by stage and source, repeats")
    add(
        "--position",
        type=int,
        metavar="N",
        help="with --blend: only what the run reads at this position, and where else",
    )
    add("--page", "--output", dest="page", type=Path, help="HTML page to write")
    add("--tokenizer", type=Path, help="default: the one in the folder's plan")
    add("--image-tokenizer", type=Path, help="default: the one in the folder's plan")
    add("--documents", type=int, default=24, help="how many to show (default %(default)s)")


def _add_pack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_folder(parser)
    add("--sequence-length", type=int, required=True, help="positions of a sample: data.sequence_length of the run")
    add(
        "--packing",
        choices=["best_fit", "whole_pictures", "continuous"],
        default="best_fit",
        help="data.packing of the run (default %(default)s)",
    )
    add("--unit", type=int, help="number of the one shard to pack, from 0; one call without it makes the index")
    add("--workers", type=int, default=1, help="processes (default %(default)s)")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder of plan and shards")


if __name__ == "__main__":
    run_tool(main, parser())
