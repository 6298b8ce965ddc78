#!/usr/bin/env python3
"""Write text and draw pictures with a trained model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megachameleon.console import progress_bar, run_tool, tool_parser

if TYPE_CHECKING:
    from megachameleon.generation.prompts import Prompt
    from megachameleon.generation.settings import GenerationSettings


def main(arguments: argparse.Namespace) -> None:
    """Read prompts, generate, and write the gallery."""
    # inside main: --help and wrong flags are answered without torch
    from megachameleon.config import ParallelConfig
    from megachameleon.generation.gallery import write_gallery
    from megachameleon.generation.loading import (
        load_image_tokenizer,
        load_text_tokenizer,
        open_model,
        read_checkpoint_info,
    )
    from megachameleon.generation.prompts import encode_prompt, require_fits
    from megachameleon.generation.rendering import render
    from megachameleon.generation.replicas import generate_shared

    settings = _settings(arguments)
    prompts = _prompts(arguments)
    info = read_checkpoint_info(arguments.checkpoint)
    text = load_text_tokenizer(info, arguments.tokenizer)
    # an image tokenizer need not be there for text alone
    needs_pictures = settings.modality != "text" or any(isinstance(s, Path) for p in prompts for s in p.segments)
    pictures = load_image_tokenizer(info, arguments.image_tokenizer) if needs_pictures else None
    ids = [encode_prompt(prompt, info.vocabulary, text, pictures) for prompt in prompts]
    # before the weights are loaded, which may take minutes
    require_fits(prompts, ids, info.config.model.context_length, settings, info.vocabulary)

    layout = ParallelConfig(tensor_parallel=arguments.tensor_parallel, pipeline_parallel=arguments.pipeline_parallel)
    with open_model(info, layout) as loaded:
        is_main = loaded.context.is_main
        with progress_bar("generating", len(ids), enabled=is_main) as bar:
            generated = generate_shared(
                loaded.stepper,
                info.vocabulary,
                ids,
                settings,
                replicas=loaded.context.groups.dp,
                on_finished=bar.advance,
            )
    if not is_main:
        return
    # RUN/checkpoints/step_N
    title = f"{info.path.parent.parent.name}, step {info.step}"
    rows = write_gallery(arguments.output, prompts, render(generated, info.vocabulary, text, pictures), title)
    for number, row in enumerate(rows):
        files = " ".join(str(arguments.output / name) for name in row["pictures"])
        print(f"[{number}] " + " ".join(filter(None, (row["text"], files))))
    print(f"wrote {arguments.output / 'index.html'}", file=sys.stderr)


def _settings(arguments: argparse.Namespace) -> "GenerationSettings":
    from megachameleon.generation.sampling import SamplingSettings
    from megachameleon.generation.settings import GenerationSettings

    def chosen(name: str) -> float:
        own = getattr(arguments, f"image_{name}")
        return getattr(arguments, name) if own is None else own

    return GenerationSettings(
        modality=arguments.modality,
        max_new_tokens=arguments.max_new_tokens,
        max_pictures=arguments.max_pictures,
        text=SamplingSettings(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            repetition_penalty=arguments.repetition_penalty,
            greedy=arguments.greedy,
        ),
        image=SamplingSettings(
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=int(chosen("top_k")),
            greedy=arguments.greedy,
        ),
        guidance=arguments.guidance,
        image_guidance=arguments.image_guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )


def _prompts(arguments: argparse.Namespace) -> "list[Prompt]":
    from megachameleon.generation.prompts import Prompt, read_prompts

    if arguments.prompts is not None and arguments.segments:
        raise ValueError("--prompts: give either a file or --prompt/--image, not both")
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
    else:
        kinds = {"--image" if isinstance(segment, Path) else "--prompt" for segment in arguments.segments}
        prompts = [Prompt(segments=tuple(arguments.segments), origin=", ".join(sorted(kinds)) or "--prompt")]
    if arguments.samples < 1:
        raise ValueError(f"--samples: {arguments.samples} must be at least 1")
    # rows of their own: each has its own draws
    return [prompt for prompt in prompts for _ in range(arguments.samples)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Continue prompts of text and pictures with text, pictures or both.",
        """\
  python tools/generate.py runs/demo/train --prompt "red heart" --modality image --output out
  python tools/generate.py runs/demo/train --image runs/demo/raw/gallery/2764.png --modality text --output out
  python tools/generate.py runs/demo/train --prompt "A cat: " --image runs/demo/raw/gallery/1f431.png \\
      --prompt " and a dog: " --output out
  python tools/generate.py runs/demo/train --prompts runs/demo/raw/prompts/draw.jsonl --modality image --output out
  torchrun --standalone --nproc-per-node 2 tools/generate.py runs/demo/train --tensor-parallel 2 --prompt "def " \\
      --output out

a line of the file of --prompts: {"segments": [{"text": "a cat: "}, {"image": "cat.png"}]} or {"text": "a cat"}""",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint")
    given = parser.add_argument_group("prompt", "repeatable, read in the order given; none begins an empty document")
    # one list for texts and pictures, which keeps the order in which they are typed
    given.add_argument("--prompt", dest="segments", action="append", type=str, default=[], metavar="TEXT")
    given.add_argument("--image", dest="segments", action="append", type=Path, metavar="PICTURE")
    given.add_argument("--prompts", type=Path, metavar="JSONL", help="a file with one prompt a line")
    given.add_argument("--samples", type=int, default=1, metavar="N", help="results per prompt (default 1)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--modality", choices=("both", "text", "image"), default="both", help="what may be generated")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: until the context is full")
    parser.add_argument("--max-pictures", type=int, metavar="N", help="per result; default 1 with --modality image")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.7)
    sampling.add_argument("--top-p", type=float, default=0.9)
    sampling.add_argument("--top-k", type=int, default=0, help="0 keeps all ids")
    sampling.add_argument("--image-temperature", type=float, help="default: --temperature")
    sampling.add_argument("--image-top-p", type=float, help="default: --top-p")
    sampling.add_argument("--image-top-k", type=int, help="default: --top-k")
    sampling.add_argument("--repetition-penalty", type=float, default=1.2, help="of text; 1 does nothing")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest id")
    sampling.add_argument("--guidance", type=float, default=3.0, help="pictures follow the text; 1 is none, and faster")
    sampling.add_argument("--image-guidance", type=float, default=1.2, help="pictures follow earlier pictures")
    sampling.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once; fewer take less memory")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one of the checkpoint")
    parser.add_argument("--image-tokenizer", type=Path, metavar="DIR", help="default: the one of the checkpoint")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N")
    return parser


if __name__ == "__main__":
    run_tool(main, build_parser())
