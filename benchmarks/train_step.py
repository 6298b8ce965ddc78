"""One optimizer step, ours against plain PyTorch, Hugging Face's Chameleon and megatron-core, interleaved.

All of them run in one process on one device with the same shapes, first weights and batches, in rounds whose order
changes. A step is forward, cross entropy with z-loss 1e-5, backward, clipping to a global norm of 1 and AdamW.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.contestants import choose_names
from benchmarks.shapes import PRESETS, Shape
from megachameleon.console import run_tool, tool_parser

SIZES = ("layers", "hidden", "heads", "kv_groups", "ffn", "vocab", "sequence_length", "micro_batch_size")
"""Fields of `Shape` that the command line may change."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    shape, names = read_shape(arguments), choose_names(arguments.contestants, arguments.precision)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch

    from benchmarks.batches import RandomSamples
    from benchmarks.comparison import SEED, compare, measure_memory, to_json
    from benchmarks.contestants.base import Settings
    from benchmarks.measuring import Plan
    from benchmarks.report import open_console, print_report
    from megachameleon.config import ParallelConfig
    from megachameleon.files import write_text
    from megachameleon.parallel.context import parallel_context
    from megachameleon.parallel.device import pick_device

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = pick_device().type == "cuda"
    if arguments.memory and on_gpu:
        raise ValueError("--memory: is for the CPU; on a GPU memory is measured in every run")
    memory = measure_memory(names, sys.argv[1:]) if arguments.memory else {}
    plan = Plan(
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        steps_per_turn=arguments.steps_per_turn,
        settle=1 if on_gpu else 0,
    )
    with parallel_context(ParallelConfig()) as context:
        settings = Settings(
            shape=shape,
            precision=arguments.precision,
            context=context,
            samples=RandomSamples(shape, arguments.documents, SEED),
            documents=arguments.documents,
            peer_z_loss=arguments.peer_z_loss,
            overrides=tuple(arguments.set),
        )
        result = compare(names, settings, plan, park=arguments.park, check=not arguments.no_check, memory=memory)
    console = open_console(width=150)
    print_report(result.rows, names[0], console)
    if arguments.output:
        write_text(arguments.output, to_json(result, settings, plan, [sys.executable, *sys.argv]))


def read_shape(arguments: argparse.Namespace) -> Shape:
    """The preset, with the sizes that were given instead.

    Raises:
        ValueError: sizes that do not divide, or counts that cannot be.
    """
    for name, least in (("rounds", 1), ("warmup", 0), ("steps_per_turn", 1), ("threads", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} must be at least {least}")
    given = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    shape = replace(PRESETS[arguments.preset], **given)
    shape.validate()
    return shape


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare one training step of megachameleon with plain PyTorch, Hugging Face's Chameleon and megatron-core.",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.train_step --preset cpu --rounds 9 --output cpu.json
  python -m benchmarks.train_step --preset cpu --precision fp32 --contestants ours plain
  python -m benchmarks.train_step --preset 1.48b --steps-per-turn 5 --output h100.json
  python -m benchmarks.train_step --preset 2.24b --park --contestants ours plain huggingface megatron
  python -m benchmarks.train_step --preset cpu --layers 2 --set kernels.attention=reference

-autocast: fp32 weights, gradients and moments under torch.autocast, the numerics of ours. Without it, peers keep all of
them in bf16, which is less work. megatron: fp32 masters and gradients like ours. plain-compiled: torch.compile of each
block and of the loss.""",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="sizes (cpu)")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="that count (9)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (2)")
    parser.add_argument("--steps-per-turn", type=int, default=1, metavar="N", help="steps of one in a round (1)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="ours, plain, plain-autocast, plain-compiled, huggingface, huggingface-autocast, megatron (all that the "
        "precision concerns, but plain-compiled); ratios are against the first",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of torch on the CPU (its own choice)")
    parser.add_argument("--documents", type=int, default=1, metavar="N", help="packed in a sample; peers mask them (1)")
    parser.add_argument("--peer-z-loss", action="store_true", help="megatron-core computes a z-loss, too")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override our configuration"
    )
    parser.add_argument("--park", action="store_true", help="those who wait leave the device (large models on a GPU)")
    parser.add_argument("--memory", action="store_true", help="CPU: peak memory of each in a process of its own")
    parser.add_argument("--no-check", action="store_true", help="measure even if first losses differ")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
