#!/usr/bin/env python3
"""Convert a checkpoint between Meta's release format, Hugging Face's and our own, at any layout.

  megatron  our own: what training saves; SRC is a checkpoint, a run's checkpoints folder, or a run (its newest)
  hf        transformers' Chameleon, and text-only Llamas as a start: a folder of config.json and *.safetensors
  meta      Meta's release: a folder of params.json and consolidated*.pth, in any number of files

From a format to itself the tensors are divided anew. All is written beside DST, which appears when it is whole.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, size_said, tool_parser

if TYPE_CHECKING:
    from megachameleon.checkpoint.formats.conversion import Conversion
    from megachameleon.checkpoint.formats.plain import Description, Sink, Source
    from megachameleon.checkpoint.formats.registry import Options

EXAMPLES = """\
  # the released 34B as the start of a run of tensor-parallel 4 x pipeline-parallel 2
  python tools/convert_checkpoint.py --from meta --to megatron downloads/data/models/30b checkpoints/chameleon_34b \\
    --tensor-parallel 4 --pipeline-parallel 2
  # ... which trains with checkpoint.init_from=checkpoints/chameleon_34b; its newest checkpoint for transformers
  python tools/convert_checkpoint.py --from megatron --to hf runs/mine exported/mine --dtype bf16 --verify \\
    --tokenizer tokenizers/text --image-tokenizer tokenizers/image
  # a model of transformers in Meta's format, in 8 files instead of the 4 of its groups of QK-norm
  python tools/convert_checkpoint.py --from hf --to meta downloads/chameleon-30b exported/30b --shards 8
  # Llama's text model as the start of a mixed-modal one, with its tokenizer (tools/import_tokenizer.py text)
  python tools/convert_checkpoint.py --from hf --to megatron llama-2-7b checkpoints/start --dtype bf16 \\
    --tokenizer tokenizers/llama --verify
  # the weights of a run alone, in bf16
  python tools/convert_checkpoint.py --from megatron --to megatron runs/mine checkpoints/mine --dtype bf16

After a kill the same command goes on with the files that are missing."""
MOST_WORKERS = 4
HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""Torch's own switch, read when it first allocates: taking memory for a tensor by small pages costs as much time as
hashing the tensor."""
APPLIES: dict[str, Callable[[argparse.Namespace], bool]] = {
    "tensor_parallel": lambda given: given.kind == "megatron",
    "pipeline_parallel": lambda given: given.kind == "megatron",
    "shard_size": lambda given: given.kind == "hf",
    "image_tokenizer": lambda given: given.kind == "hf",
    "tokenizer": lambda given: given.source_kind != "megatron" or given.kind == "hf" or given.vocab_size is not None,
    "qk_norm_groups": lambda given: given.source_kind == "hf",
    "qk_norm": lambda given: given.source_kind == "hf",
    "average_qk_norm": lambda given: given.source_kind == "hf" or given.kind == "meta",
    "shards": lambda given: given.kind == "meta",
}
"""Options that say nothing about some ways, and about which they do."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    kinds = ["megatron", "hf", "meta"]
    parser.add_argument("--from", dest="source_kind", choices=kinds, required=True, help="format of SRC")
    parser.add_argument("--to", dest="kind", choices=kinds, required=True, help="format of DST")
    parser.add_argument("source", metavar="SRC", type=Path, help="see above")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="--to megatron: files of N ranks (1)")
    parser.add_argument("--pipeline-parallel", type=int, metavar="M", help="--to megatron: of M stages each (1)")
    parser.add_argument("--shards", type=int, metavar="N", help="--to meta: files (default: one a group of QK-norm)")
    parser.add_argument("--shard-size", type=float, metavar="GB", help="--to hf: largest file (5)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of the weights (default: as stored); fp32 takes a run's masters"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="text tokenizer of ours that belongs to the model (default: the run's, or what SRC says of its ids)",
    )
    parser.add_argument(
        "--image-tokenizer", type=Path, metavar="FOLDER", help="--to hf: VQ-GAN to go along (default: the run's own)"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="ROWS", help="rows of embedding and head (default: as many as there are)"
    )
    parser.add_argument(
        "--qk-norm-groups",
        type=int,
        metavar="G",
        help="--from hf: groups of heads with a QK-norm (default: its config)",
    )
    parser.add_argument(
        "--average-qk-norm",
        action="store_true",
        help="--from hf, --to meta: where heads of a group differ, take their mean, which changes the model",
    )
    parser.add_argument(
        "--qk-norm",
        choices=["layernorm", "rmsnorm", "none"],
        help="--from hf, a Llama: what it is given, as near to identity as can be (layernorm)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), MOST_WORKERS),
        metavar="N",
        help="files at a time; each holds a few blocks of 16 MB (%(default)s here)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="then compare logits of 128 tokens, in fp32, a block of weights at a time"
    )
    parser.add_argument("--verify-only", action="store_true", help="compare a DST that is there; convert nothing")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Convert and, if asked, verify."""
    _require_sensible(arguments)
    os.environ.setdefault(*HUGE_PAGES)
    from megachameleon.checkpoint.formats.registry import is_llama, make_sink, open_source

    if arguments.verify or arguments.verify_only:
        _require_verifiable(arguments)
    if arguments.qk_norm and not is_llama(arguments.source):
        raise ValueError(f"--qk-norm: {arguments.source} is no Llama and has its own; leave it out")
    options = _options(arguments)
    source = open_source(arguments.source_kind, arguments.source, options)
    if not arguments.verify_only:
        sink = make_sink(arguments.kind, source.description, options, source)
        _tell(source.description, sink.notes)
        status = _convert(source, sink, arguments)
        if status:
            return status
    if arguments.verify or arguments.verify_only:
        _verify(arguments, source, options)
    return 0


def _options(arguments: argparse.Namespace) -> "Options":
    from megachameleon.checkpoint.formats.registry import Options

    return Options(
        dtype=arguments.dtype,
        tensor_parallel=arguments.tensor_parallel or 1,
        pipeline_parallel=arguments.pipeline_parallel or 1,
        tokenizer=arguments.tokenizer,
        image_tokenizer=arguments.image_tokenizer,
        qk_norm_groups=arguments.qk_norm_groups,
        average_qk_norm=arguments.average_qk_norm,
        shard_bytes=int(arguments.shard_size * 1e9) if arguments.shard_size else None,
        meta_shards=arguments.shards,
        vocab_size=arguments.vocab_size,
        qk_norm=arguments.qk_norm or "layernorm",
    )


def _convert(source: "Source", sink: "Sink", arguments: argparse.Namespace) -> int:
    """Convert and say what was done; returns an exit status."""
    from megachameleon.checkpoint.formats.conversion import convert, temporary_folder

    destination, start = arguments.destination, time.monotonic()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        done = convert(source, sink, destination, workers=arguments.workers)
    except KeyboardInterrupt as interrupt:
        print(
            f"interrupted: {destination} is not there yet; the same command goes on, or remove "
            f"{temporary_folder(destination)}",
            file=sys.stderr,
        )
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(_report(source.description, done, time.monotonic() - start, arguments))
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _report(description: "Description", done: "Conversion", seconds: float, arguments: argparse.Namespace) -> str:
    again = f", {done.files_found} of them from an interrupted conversion" if done.files_found else ""
    size = f"{size_said(done.num_bytes)} in {done.num_files} file{'s' if done.num_files > 1 else ''}{again}"
    use = {
        "megatron": f"start a run from it: checkpoint.init_from={arguments.destination}",
        "hf": f"load it: ChameleonForConditionalGeneration.from_pretrained({str(arguments.destination)!r})",
        "meta": "load it with Meta's own loader",
    }[arguments.kind]
    return f"{arguments.destination}: {description.model.num_parameters:,} parameters, {size}, {seconds:,.0f} s\n{use}"


def _require_verifiable(arguments: argparse.Namespace) -> None:
    """Whether it can be done, and is not to be done otherwise, before anything is converted."""
    from megachameleon.checkpoint.verifying.verification import require_verifiable

    require_verifiable({arguments.source_kind, arguments.kind})
    there = arguments.destination.exists()
    if arguments.verify_only and not there:
        raise ValueError(f"{arguments.destination}: is not there, so --verify-only cannot read it; use --verify")
    if there and not arguments.verify_only:
        raise ValueError(
            f"{arguments.destination}: exists already; --verify-only compares it without converting again, or remove "
            "it, or choose another destination"
        )


def _require_sensible(arguments: argparse.Namespace) -> None:
    for name in ("tensor_parallel", "pipeline_parallel", "workers", "qk_norm_groups", "shards", "vocab_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.shard_size is not None and not 1 <= arguments.shard_size * 1e9 < math.inf:
        raise ValueError(f"--shard-size {arguments.shard_size}: must be a number of GB, at least 1e-9")
    way = f"--from {arguments.source_kind} --to {arguments.kind}"
    for name, applies in APPLIES.items():
        value: Any = getattr(arguments, name)
        if value is not None and value is not False and not applies(arguments):
            raise ValueError(f"--{name.replace('_', '-')}: says nothing about {way}; leave it out")


def _tell(description: "Description", notes: tuple[str, ...]) -> None:
    """What was recognised, and what is left out, a line each."""
    for note in (*description.notes, *notes):
        print(f"note: {note}")


def _verify(arguments: argparse.Namespace, source: "Source", options: "Options") -> None:
    from megachameleon.checkpoint.formats.registry import target_dtype
    from megachameleon.checkpoint.verifying.conversion import verify_conversion
    from megachameleon.checkpoint.verifying.verification import Side

    before = Side(kind=arguments.source_kind, path=source.description.origin, exact=arguments.dtype == "fp32")
    after = Side(kind=arguments.kind, path=arguments.destination)
    rounding = target_dtype(source.description, options)
    for line in verify_conversion(source, before, after, rounding, averages=arguments.average_qk_norm):
        print(line)


if __name__ == "__main__":
    run_tool(main, parser())
