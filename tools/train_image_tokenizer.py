"""Train a VQ image tokenizer from pictures in tars and folders."""

import argparse
from pathlib import Path

from megachameleon.console import run_tool, tool_parser

EXAMPLES = """\
  python tools/train_image_tokenizer.py --input data/captioned.tar data/more-pictures/ --output tokenizers/image \\
      --image-size 64 --grid 8 --num-codes 1024 --steps 750
  torchrun --nproc-per-node 2 tools/train_image_tokenizer.py --input data/*.tar --output tokenizers/image

Writes image_tokenizer.json, image_tokenizer.safetensors, metrics.jsonl, report.json, reconstructions.png and
quarantine.jsonl (pictures that could not be read). The same command again goes on where it was interrupted."""


def main(arguments: argparse.Namespace) -> None:
    """Turn arguments into a job and run it on this process's device."""
    from megachameleon.tokens.vq.job import Job, run_job
    from megachameleon.tokens.vq.network import PatchConfig
    from megachameleon.tokens.vq.runtime import best_precision, process_group
    from megachameleon.tokens.vq.training import TrainingConfig

    with process_group(arguments.threads) as device:
        precision = best_precision(device) if arguments.precision == "auto" else arguments.precision
        job = Job(
            inputs=tuple(arguments.input),
            output=arguments.output,
            shape=PatchConfig(image_size=arguments.image_size, grid=arguments.grid, code_dim=arguments.code_dim),
            training=TrainingConfig(
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                num_codes=arguments.num_codes,
                learning_rate=arguments.learning_rate,
                precision=precision,
                seed=arguments.seed,
            ),
            held_out=arguments.held_out,
            max_pictures=arguments.max_pictures,
            checkpoint_every=arguments.checkpoint_every,
        )
        run_job(job, device)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser("Train a VQ image tokenizer from scratch.", EXAMPLES)
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help="uncompressed tars and folders of .png, .jpg, .webp")
    add("--output", type=Path, required=True, help="folder for the tokenizer and its report")
    add("--image-size", type=int, default=64, help="side of a picture in pixels (%(default)s)")
    add("--grid", type=int, default=8, help="rows and columns of codes (%(default)s)")
    add("--num-codes", type=int, default=1024, help="size of the codebook (%(default)s)")
    add("--code-dim", type=int, default=32, help="length of a code vector (%(default)s)")
    add("--steps", type=int, default=750, help="training steps (%(default)s)")
    add("--batch-size", type=int, default=32, help="pictures in a step, over all processes (%(default)s)")
    add("--learning-rate", type=float, default=0.015, help="peak learning rate of Muon (%(default)s)")
    add("--held-out", type=int, default=200, help="pictures not trained on, at most a tenth (%(default)s)")
    add("--max-pictures", type=int, default=50_000, help="more are sampled down to this many (%(default)s)")
    add("--checkpoint-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")
    add(
        "--threads", type=int, default=None, help="CPU threads of each process (default: OMP_NUM_THREADS, or all cores)"
    )
    add("--seed", type=int, default=0, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_tool(main, build_parser())
