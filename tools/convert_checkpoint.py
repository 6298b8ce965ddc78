#!/usr/bin/env python3
"""Convert a checkpoint between our own format and Hugging Face's, whatever layout wrote it."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from megachameleon.checkpoint.formats.plain import Description, Source
    from megachameleon.checkpoint.formats.registry import Options

EXAMPLES = """\
  # a run's newest checkpoint for transformers, with its tokenizers
  python tools/convert_checkpoint.py --from megatron --to hf runs/mine exported/mine \\
    --tokenizer tokenizers/text --image-tokenizer tokenizers/image --verify
  # a released model as the start of a run: checkpoint.init_from=checkpoints/chameleon_34b
  python tools/convert_checkpoint.py --from hf --to megatron downloads/chameleon-30b checkpoints/chameleon_34b \\
    --tensor-parallel 4 --pipeline-parallel 2
  # the weights of a run alone, in bf16
  python tools/convert_checkpoint.py --from megatron --to megatron runs/mine checkpoints/mine --dtype bf16

After a kill the same command goes on; DST appears when it is whole."""
MOST_WORKERS = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    kinds = ["megatron", "hf", "meta"]
    parser.add_argument("--from", dest="source_kind", choices=kinds, required=True, help="format of SRC")
    parser.add_argument("--to", dest="kind", choices=kinds, required=True, help="format of DST")
    parser.add_argument("source", metavar="SRC", type=Path, help="megatron: checkpoint or run; hf: folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="megatron: files by N ranks")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="M", help="megatron: of M stages each")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of the weights (default: as stored); fp32 takes a run's masters"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="text tokenizer (default: the run's own)")
    parser.add_argument(
        "--image-tokenizer",
        type=Path,
        metavar="FOLDER",
        help="VQ-GAN for --to hf (default: the run's own)",
    )
    parser.add_argument(
        "--qk-norm-groups", type=int, metavar="G", help="hf: groups of heads with a QK-norm each (default: its config)"
    )
    parser.add_argument(
        "--average-qk-norm", action="store_true", help="hf: where heads of a group differ, take the mean"
    )
    parser.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="--to hf: largest file")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="--to meta: files of the model (default: its groups of QK-norm)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="ROWS",
        help="rows of embedding and head to write (default: as many as there are)",
    )
    parser.add_argument(
        "--qk-norm",
        choices=["layernorm", "rmsnorm", "none"],
        help="a Llama: what it is given, as near to identity as can be (default: layernorm)",
    )
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, MOST_WORKERS), help="processes (default %(default)s)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="then compare logits of 128 tokens, in fp32, a block of weights at a time"
    )
    parser.add_argument("--verify-only", action="store_true", help="compare a DST that is there; convert nothing")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Convert and, if asked, verify."""
    _require_sensible(arguments)
    from megachameleon.checkpoint.formats.conversion import convert
    from megachameleon.checkpoint.formats.registry import Options, make_sink, open_source

    if arguments.verify or arguments.verify_only:
        _require_verifiable(arguments)
    options = Options(
        dtype=arguments.dtype,
        tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel,
        tokenizer=arguments.tokenizer,
        image_tokenizer=arguments.image_tokenizer,
        qk_norm_groups=arguments.qk_norm_groups,
        average_qk_norm=arguments.average_qk_norm,
        shard_bytes=int(arguments.shard_size * 1e9),
        meta_shards=arguments.shards,
        vocab_size=arguments.vocab_size,
        qk_norm=arguments.qk_norm or "layernorm",
    )
    source = open_source(arguments.source_kind, arguments.source, options)
    if arguments.verify_only:
        return _verify(arguments, source, options)
    sink = make_sink(arguments.kind, source.description, options, source)
    _tell(source.description, sink.notes)
    done = convert(source, sink, arguments.destination, workers=arguments.workers)
    again = f", {done.files_found} of them from an interrupted conversion" if done.files_found else ""
    size = f"{done.num_bytes / 1e9:.3g} GB in {done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{arguments.destination}: {source.description.model.num_parameters:,} parameters, {size}{again}")
    if arguments.verify:
        _verify(arguments, source, options)


def _require_verifiable(arguments: argparse.Namespace) -> None:
    """Whether it can be done, and is not to be done otherwise, before anything is converted."""
    from megachameleon.checkpoint.formats.verifying import require_verifiable

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
    if not arguments.shard_size > 0:
        raise ValueError(f"--shard-size {arguments.shard_size}: must be more than 0")
    useless: dict[str, Any] = {}
    if arguments.kind != "megatron":
        useless |= {"--tensor-parallel": arguments.tensor_parallel > 1}
        useless |= {"--pipeline-parallel": arguments.pipeline_parallel > 1}
    else:
        useless |= {"--image-tokenizer": arguments.image_tokenizer}
    if arguments.source_kind != "hf":
        useless |= {"--qk-norm-groups": arguments.qk_norm_groups, "--qk-norm": arguments.qk_norm}
    if arguments.source_kind != "hf" and arguments.kind != "meta":
        useless |= {"--average-qk-norm": arguments.average_qk_norm}
    if arguments.kind != "meta":
        useless |= {"--shards": arguments.shards}
    for option, given in useless.items():
        if given:
            way = f"--from {arguments.source_kind} --to {arguments.kind}"
            raise ValueError(f"{option}: says nothing about {way}; leave it out")


def _tell(description: "Description", notes: tuple[str, ...]) -> None:
    """What was recognised, and what is left out, a line each."""
    for note in (*description.notes, *notes):
        print(f"note: {note}")


def _verify(arguments: argparse.Namespace, source: "Source", options: "Options") -> None:
    from megachameleon.checkpoint.formats.registry import target_dtype
    from megachameleon.checkpoint.formats.verifying import Side
    from megachameleon.checkpoint.formats.verifying_conversion import verify_conversion

    before = Side(kind=arguments.source_kind, path=source.description.origin, exact=arguments.dtype == "fp32")
    after = Side(kind=arguments.kind, path=arguments.destination)
    rounding = target_dtype(source.description, options)
    for line in verify_conversion(source, before, after, rounding, averages=arguments.average_qk_norm):
        print(line)


if __name__ == "__main__":
    run_tool(main, parser())
