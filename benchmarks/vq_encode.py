"""Pictures to codes by Chameleon's VQ-GAN: ours against Hugging Face's with the same random weights, interleaved.

A step encodes one batch. Times are CPU seconds of the process, on CUDA those of the clock. Ratios are their time over
ours, so above 1 we are faster; codes are compared with those of Hugging Face in fp32.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.contestants.picture_encoders import Encoder
    from benchmarks.measuring import Timing

NAMES = ("ours", "ours-bf16", "ours-plain", "huggingface", "huggingface-channels-last", "huggingface-bf16")
DEFAULT_NAMES = ("ours", "ours-bf16", "huggingface")
SAME = ("ours", "ours-plain", "huggingface", "huggingface-channels-last")
"""Those that must give the same codes."""
LEAST_EQUAL = 0.999
"""Share of equal codes; rounding may turn a near tie."""


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    for name in ("pictures", "batch", "size", "channels", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: {getattr(arguments, name)} must be at least 1")
    if "ours" not in arguments.contestants or arguments.warmup < 0 or arguments.threads < 0:
        raise ValueError(
            "--contestants: must hold ours, which ratios are against; --warmup, --threads: must not be negative"
        )
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch

    from benchmarks.contestants.picture_encoders import BUILDERS, Weights
    from benchmarks.machine import describe_machine
    from benchmarks.measuring import Plan, interleave
    from benchmarks.parking import Parking
    from megachameleon.files import write_text
    from megachameleon.tokens.vq.vqgan import VQGANConfig

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if arguments.device == "cuda" or torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    weights = Weights(VQGANConfig(image_size=arguments.size, base_channels=arguments.channels), device)
    pictures = draw_pictures(max(arguments.pictures, arguments.batch), arguments.size)
    with torch.inference_mode():
        encoders = {name: BUILDERS[name](weights) for name in arguments.contestants}
        shares = compare_codes(encoders, BUILDERS["huggingface"](weights), pictures[: arguments.pictures])
        steppers = {name: Batches(encoder, pictures, arguments.batch) for name, encoder in encoders.items()}
        plan = Plan(rounds=arguments.rounds, warmup=arguments.warmup, steps_per_turn=1, settle=0)
        timings = interleave(steppers, plan, device, Parking(device, enabled=False))
    rows = summarise(arguments.contestants, timings, shares, arguments.batch, on_gpu=device.type == "cuda")
    print_rows(rows, arguments)
    if arguments.output:
        about = {"command": [sys.executable, *sys.argv], "machine": machine, "arguments": vars(arguments)}
        found = {"rows": rows, "samples": list(map(asdict, timings))}
        write_text(arguments.output, json.dumps({**about, **found}, indent=1, default=str))


def draw_pictures(count: int, size: int) -> "Tensor":
    """uint8 [count, 3, size, size], drawn from seeds."""
    import numpy as np
    import torch

    from benchmarks.photographs import draw_photograph

    drawn = [draw_photograph(np.random.default_rng((0, number)), size, size) for number in range(count)]
    return torch.from_numpy(np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in drawn]))


class Batches:
    """One contestant; a step encodes the next batch."""

    def __init__(self, encode: "Encoder", pictures: "Tensor", size: int) -> None:
        self.encode, self.pictures, self.size = encode, pictures, size

    def step(self, number: int) -> float:
        """The sum of all codes."""
        start = number * self.size % (len(self.pictures) - self.size + 1)
        # a float: reading it waits for the device
        return float(self.encode(self.pictures[start : start + self.size]).sum())


def compare_codes(encoders: "Mapping[str, Encoder]", reference: "Encoder", pictures: "Tensor") -> dict[str, float]:
    """Share of codes that equal the reference's.

    Raises:
        ValueError: one that should compute the same does not, so that its time would say nothing.
    """
    expected = [reference(picture[None]) for picture in pictures]
    shares = {}
    for name, encode in encoders.items():
        # one by one, as the reference: another batch size may round otherwise
        found = [encode(picture[None]) for picture in pictures]
        pairs = zip(found, expected, strict=True)
        shares[name] = sum(float((own.cpu() == codes.cpu()).float().mean()) for own, codes in pairs) / len(pictures)
        if name in SAME and shares[name] < LEAST_EQUAL:
            raise ValueError(f"--contestants: {name} gives the codes of {shares[name]:.2%} of patches only")
    return shares


def summarise(
    names: Sequence[str], timings: "Sequence[Timing]", shares: Mapping[str, float], batch: int, *, on_gpu: bool
) -> list[dict[str, Any]]:
    """One row a contestant."""
    from benchmarks.measuring import Spread, by_round, ratios

    def seconds(timing: "Timing") -> float:
        return timing.wall_seconds if on_gpu else timing.cpu_seconds

    rows = []
    for name in names:
        taken = Spread.of([value / batch for value in by_round(timings, name, seconds)])
        rows.append(
            {
                "name": name,
                "seconds_per_picture": asdict(taken),
                "pictures_per_second": 1 / taken.median,
                "ratio": asdict(Spread.of(list(ratios(timings, name, "ours", seconds)))),
                "equal_codes": shares[name],
            }
        )
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """The table."""
    from rich import box
    from rich.table import Table

    from benchmarks.report import open_console

    caption = f"{arguments.size} px, batches of {arguments.batch}; ratio: time over ours; in brackets, quartiles"
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("", "pictures/s", "s / picture", "ratio", "equal codes"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        taken, ratio = row["seconds_per_picture"], row["ratio"]
        table.add_row(
            row["name"],
            f"{row['pictures_per_second']:.3f}",
            f"{taken['median']:.3f} [{taken['low_quartile']:.3f} {taken['high_quartile']:.3f}]",
            f"{ratio['median']:.2f} [{ratio['low_quartile']:.2f} {ratio['high_quartile']:.2f}]",
            f"{row['equal_codes']:.2%}",
        )
    open_console().print(table)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Compare encoders of pictures: speed, and codes equal to Hugging Face's.",
        """\
  OMP_NUM_THREADS=1 python -m benchmarks.vq_encode --device cpu --threads 1 --output vq.json
  python -m benchmarks.vq_encode --device cuda --batch 32 --pictures 64 --rounds 20

ours-plain: layer by layer, as on CUDA. huggingface: Transformers' ChameleonVQVAE, eager; on CUDA it uses TF32.""",
    )
    parser.add_argument(
        "--contestants", nargs="+", choices=NAMES, default=list(DEFAULT_NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    for name, default, meaning in (
        ("pictures", 2, "whose codes are compared"),
        ("batch", 1, "pictures in a step"),
        ("size", 512, "side of a picture"),
        ("channels", 128, "of the network at full resolution"),
        ("rounds", 5, "that count"),
        ("warmup", 1, "rounds before them"),
        ("threads", 0, "of torch on the CPU, 0 for its own choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every sample")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
