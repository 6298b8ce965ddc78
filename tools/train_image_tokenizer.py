"""Train a VQ image tokenizer from pictures in tars and folders."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import run_tool, tool_parser

if TYPE_CHECKING:
    from megachameleon.tokens.vq.job import Job

EXAMPLES = """\
  a small one, for two CPU cores:
    python tools/train_image_tokenizer.py --input data/captioned.tar data/more-pictures/ --output tokenizers/image \\
        --image-size 64 --grid 8 --num-codes 1024 --steps 750
  Chameleon's VQ-GAN on 8 GPUs, faces drawn twice as often:
    torchrun --standalone --nproc-per-node 8 tools/train_image_tokenizer.py --network vqgan \\
        --input faces=data/faces/ data/*.tar --weight faces=2 --output tokenizers/vqgan \\
        --perceptual weights/vgg16-397923af.pth --fid-weights weights/weights-inception-2015-12-05-6726825d.pth \\
        --evaluate-every 5000 --pictures-every 1000 --checkpoint-every 1000
  the same from a file, with another rate:
    torchrun ... tools/train_image_tokenizer.py --config vqgan.yaml --learning-rate 5e-5

Writes image_tokenizer.json, image_tokenizer.safetensors, metrics.jsonl, report.json, report.html, reconstructions.png
and quarantine.jsonl (pictures that could not be read). The same command again goes on where it was interrupted. A
config file holds the long names of flags: `steps: 1000`, `input: [a.tar, faces=b/]`; flags given beside it win."""

PATCH_ONLY = ("grid",)
"""Flags of the small network alone."""
VQGAN_ONLY = (
    *("channels", "multipliers", "res_blocks", "accumulate", "warmup", "codebook_start", "l1_weight", "l2_weight"),
    *("perceptual", "perceptual_weight", "gan_weight", "gan_start", "discriminator_channels", "discriminator_layers"),
    "discriminator_rate",
    *("ema_decay", "zoom", "flip", "workers"),
)
NOT_IN_CONFIG = ("config", "help", "debug")
"""Flags that a file cannot hold."""


def main(arguments: argparse.Namespace) -> None:
    """Turn arguments into a job and run it on this process's device."""
    if arguments.config:
        # argparse takes the last of two equal flags, so typed ones win
        arguments = build_parser().parse_args([*config_arguments(arguments.config), *sys.argv[1:]])
    # only now: --help and wrong flags are answered without torch
    from megachameleon.tokens.vq.running import run_job
    from megachameleon.tokens.vq.runtime import process_group

    with process_group(arguments.threads) as device:
        run_job(make_job(arguments, device), device)


def make_job(arguments: argparse.Namespace, device: Any) -> "Job":
    """The job that the arguments describe; what is not given is left to the defaults of the job's parts."""
    from megachameleon.tokens.vq.gan_training import GanTraining
    from megachameleon.tokens.vq.job import Job
    from megachameleon.tokens.vq.network import PatchConfig
    from megachameleon.tokens.vq.patch_training import PatchTraining
    from megachameleon.tokens.vq.runtime import best_precision
    from megachameleon.tokens.vq.source import parse_input
    from megachameleon.tokens.vq.stream_feed import Augmentation
    from megachameleon.tokens.vq.vqgan import VQGANConfig

    for name in ("input", "output"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is missing; give it, or write it in the file of --config")
    vqgan = arguments.network == "vqgan"
    for name in PATCH_ONLY if vqgan else VQGAN_ONLY:
        # flags have no defaults in the parser, so None is "not given"
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is not a setting of --network {arguments.network}; leave it out"
            )
    precision = best_precision(device) if arguments.precision == "auto" else arguments.precision
    shared = {"precision": precision} | _given(
        arguments, "steps", "batch_size", "learning_rate", "commitment", "codebook_decay", "revive_until", "seed"
    )
    shape: PatchConfig | VQGANConfig
    training: PatchTraining | GanTraining
    if vqgan:
        names = {"channels": "base_channels", "multipliers": "channel_multipliers", "res_blocks": "num_res_blocks"}
        renamed = {names[name]: value for name, value in _given(arguments, *names).items()}
        shape = VQGANConfig(**renamed, **_given(arguments, "image_size", "num_codes", "code_dim"))
        own = [name for name in VQGAN_ONLY if name not in (*names, "zoom", "flip", "workers")]
        training = GanTraining(**shared, **_given(arguments, *own))
    else:
        shape = PatchConfig(**_given(arguments, "image_size", "grid", "code_dim"))
        training = PatchTraining(**shared, **_given(arguments, "num_codes"))
    job_names = ("held_out", "checkpoint_every", "evaluate_every", "pictures_every", "fid_weights", "workers")
    max_pictures = {"max_pictures": None if vqgan else 50_000} | _given(arguments, "max_pictures")
    return Job(
        inputs=tuple(parse_input(text) for text in arguments.input),
        output=arguments.output,
        shape=shape,
        training=training,
        weights=dict(parse_weight(text) for text in arguments.weight or ()),
        augmentation=Augmentation(**_given(arguments, "zoom", "flip")),
        **max_pictures,
        **_given(arguments, *job_names),
    )


def parse_weight(text: str) -> tuple[str, float]:
    """`faces=2` to ("faces", 2.0)."""
    tag, _, factor = text.partition("=")
    try:
        return tag, float(factor)
    except ValueError:
        raise ValueError(f"--weight {text}: write TAG=FACTOR, such as faces=2") from None


def config_arguments(path: Path) -> list[str]:
    """A YAML file of flags as command-line arguments, to stand before those that were typed.

    Raises:
        ValueError: the file is not a mapping, or names an unknown flag.
        OSError: it is missing.
    """
    import difflib

    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: write one `flag: value` a line")
    actions = {action.dest: action for action in build_parser()._actions if action.dest not in NOT_IN_CONFIG}
    arguments: list[str] = []
    for name, value in values.items():
        dest = str(name).replace("-", "_")
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"--config {path}: {name!r} is not a flag of this tool{hint}")
        flag = f"--{dest.replace('_', '-')}"
        if isinstance(actions[dest], argparse.BooleanOptionalAction):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            arguments += [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return arguments


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def build_parser() -> argparse.ArgumentParser:
    """The command line; a default in brackets is that of the small network, then that of the VQ-GAN."""
    parser = tool_parser("Train a VQ image tokenizer from scratch.", EXAMPLES)
    add = parser.add_argument
    add("--config", type=Path, help="YAML file of flags; flags given beside it win")
    add(
        "--network",
        choices=("patch", "vqgan"),
        default="patch",
        help="a small autoencoder, or Chameleon's (%(default)s)",
    )
    add("--input", nargs="+", metavar="[TAG=]PATH", help="uncompressed tars and folders of .png, .jpg, .webp")
    add("--weight", nargs="+", metavar="TAG=FACTOR", help="draw pictures of a tag so many times as often (faces=2)")
    add("--output", type=Path, help="folder for the tokenizer and its report")
    add("--image-size", type=int, help="side of a picture in pixels (64; 512)")
    add("--grid", type=int, help="rows and columns of codes of the small network (8); the VQ-GAN's: side / 16")
    add("--num-codes", type=int, help="size of the codebook (1024; 8192)")
    add("--code-dim", type=int, help="length of a code vector (32; 256)")
    add("--steps", type=int, help="training steps (750; 250,000)")
    add("--batch-size", type=int, help="pictures in a step, over all processes (32; 128)")
    add("--learning-rate", type=float, help="peak learning rate (0.015 of Muon; 1e-4 of Adam)")
    add("--commitment", type=float, help="weight of the distance between vectors and codes (0.25)")
    add("--codebook-decay", type=float, help="of the codes' moving averages (0.98; 0.99)")
    add("--revive-until", type=float, help="part of the steps in which unused codes are revived (0.8)")
    add("--held-out", type=int, help="pictures not trained on, at most a tenth (200)")
    add("--max-pictures", type=int, help="more are sampled down to this many (50,000; all)")
    add("--checkpoint-every", type=int, help="steps between checkpoints (100)")
    add("--evaluate-every", type=int, help="steps between evaluations of held-out pictures (0: at the end)")
    add("--pictures-every", type=int, help="steps between sheets of reconstructions (0: at the end)")
    add("--fid-weights", type=Path, help="torch-fidelity's InceptionV3 as a file, for the rFID (without: not measured)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")
    threads = "CPU threads of each process (default: OMP_NUM_THREADS, or all cores)"
    add("--threads", type=int, help=threads)
    add("--seed", type=int, help="(0)")
    _add_vqgan(parser.add_argument_group("of --network vqgan").add_argument)
    return parser


def _add_vqgan(add: Any) -> None:
    add("--channels", type=int, help="at full resolution (128)")
    add("--multipliers", type=int, nargs="+", help="of the channels, a level each; levels halve the side (1 1 2 2 4)")
    add("--res-blocks", type=int, help="residual blocks a level (2)")
    add("--accumulate", type=int, help="parts that a process divides its pictures of a step into (1)")
    add("--warmup", type=int, help="steps in which the rate rises (2,000, at most a twentieth)")
    add("--codebook-start", type=int, help="first step with codes (2,000, at most a fifth)")
    add("--l1-weight", type=float, help="of absolute differences of pixels (1)")
    add("--l2-weight", type=float, help="of squared differences of pixels (0)")
    add("--perceptual", type=Path, help="torchvision's VGG-16 as a file, for LPIPS (without: the term is off)")
    add("--perceptual-weight", type=float, help="of LPIPS (1)")
    add(
        "--gan-weight",
        type=float,
        help="of the adversarial term, times the adaptive weight; 0: no discriminator (0.2)",
    )
    add("--gan-start", type=int, help="first step with the discriminator (a tenth of the steps)")
    add("--discriminator-rate", type=float, help="its learning rate, a multiple of the network's (2)")
    add("--discriminator-channels", type=int, help="after its first convolution (64)")
    add("--discriminator-layers", type=int, help="convolutions of stride 2 (3)")
    add("--ema-decay", type=float, help="of the averaged weights, which are evaluated and saved (0.9999)")
    add("--zoom", type=float, help="random crops go up to this much closer (1.1); 1: only along the long side")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror every other picture (yes)")
    add("--workers", type=int, help="threads of a process that decode pictures (4)")


if __name__ == "__main__":
    run_tool(main, build_parser())
