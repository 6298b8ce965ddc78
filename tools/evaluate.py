#!/usr/bin/env python3
"""Measure a trained model: drawings, captions, losses."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.console import progress_bar, run_tool, tool_parser

if TYPE_CHECKING:
    from megachameleon.config import ParallelConfig
    from megachameleon.evaluation.inputs import Inputs
    from megachameleon.generation.loading import CheckpointInfo
    from megachameleon.generation.settings import GenerationSettings


def retrieval(arguments: argparse.Namespace) -> None:
    """Draw the prompts and look for each drawing's nearest real picture."""
    # inside the commands, here and below: --help and wrong flags are answered without torch
    import numpy as np
    import torch

    from megachameleon.evaluation.retrieval import retrieval_report
    from megachameleon.files import atomic_path
    from megachameleon.generation.drawing import draw
    from megachameleon.generation.loading import open_model
    from megachameleon.generation.rendering import contact_sheet

    settings, given = _settings(arguments), _inputs(arguments)
    with open_model(given.info, _layout(arguments)) as loaded:
        is_main = loaded.context.is_main
        with progress_bar("drawing", len(given.prompts), enabled=is_main) as bar:
            texts = [prompt.text for prompt in given.prompts]
            model = (loaded.stepper, given.info.vocabulary, given.text, given.pictures)
            drawn = draw(*model, texts, settings, replicas=loaded.context.groups.dp, on_finished=bar.advance)
    if not is_main:
        return
    drawings = np.stack([np.asarray(image).transpose(2, 0, 1) for image in drawn])
    codes = given.pictures.encode(torch.from_numpy(given.gallery.pictures))
    reconstructed = given.pictures.decode(codes).numpy()
    report = retrieval_report(given.prompts, drawings, given.gallery, reconstructed, str(arguments.prompts))
    _write_report(arguments.output / "retrieval.json", given.info, report)
    with atomic_path(arguments.output / "drawings.png") as temporary:
        contact_sheet(drawn, columns=16).save(temporary, format="PNG")
    print(f"nearest of {report['gallery']:,} real pictures is the prompted one:")
    _print_groups(report["groups"], ("top1", "top5", "chance"))
    print("ceiling, the prompted pictures' own reconstructions:")
    _print_groups(report["ceiling"], ("top1", "top5"))


def captions(arguments: argparse.Namespace) -> None:
    """Have the model name the pictures of the prompts."""
    from megachameleon.evaluation.captions import KnownNames, caption_report
    from megachameleon.evaluation.gallery import read_named_prompts
    from megachameleon.generation.drawing import describe
    from megachameleon.generation.loading import open_model

    settings, given = _settings(arguments), _inputs(arguments)
    named = [name for path in (arguments.prompts, *arguments.names) for name in read_named_prompts(path)]
    names = KnownNames(given.gallery.merge_names(named))
    positions = given.gallery.positions([prompt.key for prompt in given.prompts], str(arguments.prompts))
    with open_model(given.info, _layout(arguments)) as loaded:
        is_main = loaded.context.is_main
        with progress_bar("reading", len(given.prompts), enabled=is_main) as bar:
            shown = given.gallery.pictures[positions]
            model = (loaded.stepper, given.info.vocabulary, given.text, given.pictures)
            said = describe(*model, shown, settings, replicas=loaded.context.groups.dp, on_finished=bar.advance)
    if not is_main:
        return
    report = caption_report(given.gallery.merge_names(given.prompts), [one.strip() for one in said], names)
    _write_report(arguments.output / "captions.json", given.info, report)
    _print_groups(report["groups"], ("exact", "any_name", "nearest_name"))


def loss(arguments: argparse.Namespace) -> None:
    """Mean losses by modality on shards."""
    from megachameleon.evaluation.shard_losses import open_samples, shard_losses
    from megachameleon.generation.loading import open_model, read_checkpoint_info

    info = read_checkpoint_info(arguments.checkpoint)
    samples = open_samples(_datasets(arguments.data), info, arguments.limit)
    with open_model(info, _layout(arguments)) as loaded:
        reports = shard_losses(
            loaded.model, samples, info.config, loaded.context, micro_batch_size=arguments.batch_size
        )
        is_main = loaded.context.is_main
    if not is_main:
        return
    # JSON has no NaN, which a modality without labels has
    losses = {name: {k: v if math.isfinite(v) else None for k, v in report.items()} for name, report in reports.items()}
    _write_report(arguments.output / "losses.json", info, {"losses": losses})
    for name, report in reports.items():
        parts = ", ".join(f"{key} {report[key]:.4f}" for key in ("loss", "loss_text", "loss_image", "log_z"))
        print(f"{name}: {parts} over {report['num_tokens']:,} tokens")


def _inputs(arguments: argparse.Namespace) -> "Inputs":
    from megachameleon.evaluation.inputs import read_inputs

    return read_inputs(
        arguments.checkpoint,
        arguments.prompts,
        arguments.gallery,
        limit=arguments.limit,
        tokenizer=arguments.tokenizer,
        image_tokenizer=arguments.image_tokenizer,
    )


def _write_report(path: Path, info: "CheckpointInfo", report: dict[str, Any]) -> None:
    from megachameleon.files import write_json

    write_json(path, {"checkpoint": str(info.path), "step": info.step, **report})


def _print_groups(groups: Iterable[dict[str, Any]], measures: tuple[str, ...]) -> None:
    for group in groups:
        parts = []
        for measure in measures:
            interval = group.get(f"{measure}_interval")
            spread = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
            parts.append(f"{measure} {100 * group[measure]:.2f} %{spread}")
        print(f"  {group['name'] or 'prompts'} ({group['prompts']}): {', '.join(parts)}")


def _datasets(pairs: list[str]) -> dict[str, Path]:
    # at the first "=", for paths may have more
    named = dict(pair.partition("=")[::2] for pair in pairs)
    for name, path in named.items():
        if not name or not path:
            raise ValueError(f"--data: {name or path!r} is not NAME=PATH; write --data pairs=shards/pairs")
    return {name: Path(path) for name, path in named.items()}


def _settings(arguments: argparse.Namespace) -> "GenerationSettings":
    from megachameleon.generation.sampling import SamplingSettings
    from megachameleon.generation.settings import GenerationSettings

    sampling = SamplingSettings(
        temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k, greedy=arguments.greedy
    )
    return GenerationSettings(
        text=sampling,
        image=sampling,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )


def _layout(arguments: argparse.Namespace) -> "ParallelConfig":
    from megachameleon.config import ParallelConfig

    return ParallelConfig(tensor_parallel=arguments.tensor_parallel, pipeline_parallel=arguments.pipeline_parallel)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Measure a trained model. Each command writes a JSON report into --output and prints its rates.",
        """\
  python tools/evaluate.py retrieval runs/demo/train --prompts runs/demo/raw/prompts/retrieval.jsonl \\
      --gallery runs/demo/raw/gallery --output out
  python tools/evaluate.py captions runs/demo/train --prompts runs/demo/raw/prompts/retrieval.jsonl \\
      --gallery runs/demo/raw/gallery --limit 10 --output out
  python tools/evaluate.py loss runs/demo/train --data world=runs/demo/shards/valid_world \\
      --data text=runs/demo/shards/valid_text --output out

a line of prompts.jsonl: {"text": "red heart", "key": "2764", "kind": "seen", "lang": "en"}; the gallery, a folder or a
tar, has KEY.png for each key""",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    drawn = _command(commands, "retrieval", retrieval, "is the real picture nearest to a drawing the prompted one?")
    _add_prompts(drawn)
    _add_sampling(drawn, greedy=False)
    read = _command(commands, "captions", captions, "is the caption of a picture its name?")
    _add_prompts(read)
    read.add_argument(
        "--names", type=Path, action="append", default=[], metavar="JSONL", help="further names of pictures; repeatable"
    )
    _add_sampling(read, greedy=True)
    shards = _command(commands, "loss", loss, "losses by modality on shards")
    shards.add_argument("--data", action="append", required=True, metavar="NAME=PATH", help="shards; repeatable")
    shards.add_argument("--limit", type=int, metavar="N", help="samples of each dataset; default: all")
    shards.add_argument("--batch-size", type=int, default=4, help="samples at once")
    return parser


def _command(
    commands: Any, name: str, main: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text.capitalize())
    command.set_defaults(main=main)
    command.add_argument("checkpoint", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    command.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    command.add_argument("--pipeline-parallel", type=int, default=1, metavar="N")
    return command


def _add_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompts", type=Path, required=True, metavar="JSONL", help="captions and their keys")
    command.add_argument("--gallery", type=Path, required=True, metavar="DIR|TAR", help="real pictures KEY.png")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    command.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one of the checkpoint")
    command.add_argument("--image-tokenizer", type=Path, metavar="DIR", help="default: the one of the checkpoint")


def _add_sampling(command: argparse.ArgumentParser, *, greedy: bool) -> None:
    command.add_argument("--temperature", type=float, default=0.7)
    command.add_argument("--top-p", type=float, default=0.9)
    command.add_argument("--top-k", type=int, default=0, help="0 keeps all ids")
    command.add_argument("--greedy", action=argparse.BooleanOptionalAction, default=greedy)
    command.add_argument(
        "--guidance", type=float, default=3.0, help="drawings follow the caption; 1 is none, and faster"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=64, help="prompts at once; fewer take less memory")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest caption")


def main(arguments: argparse.Namespace) -> None:
    """Run the chosen command."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit: {arguments.limit} must be at least 1")
    arguments.main(arguments)


if __name__ == "__main__":
    run_tool(main, build_parser())
