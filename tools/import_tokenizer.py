"""Bring in the tokenizers of a Chameleon release or a Llama, and give a text tokenizer to Hugging Face."""

import argparse
from pathlib import Path

from megachameleon.console import progress_bar, run_tool, tool_parser

EXAMPLES = """\
  # Meta's files, by name or by the folder that holds them
  python tools/import_tokenizer.py text chameleon/data/tokenizer/text_tokenizer.json --output tokenizers/text
  python tools/import_tokenizer.py image chameleon/data/tokenizer --output tokenizers/image
  # Llama's text with ids for pictures, for a mixed-modal model that starts from its weights
  python tools/import_tokenizer.py text llama-2-7b/ --output tokenizers/llama --image-codes 8192 --image-grid 32x32
  # a text tokenizer of ours, trained or imported, for tokenizers and transformers
  python tools/import_tokenizer.py export tokenizers/text --output tokenizers/text-hf
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="import Chameleon's text_tokenizer.json, or Llama's tokenizer.model")
    text.add_argument(
        "source", type=Path, help="text_tokenizer.json, tokenizer.model, a tokenizer.json, or their folder"
    )
    text.add_argument("--output", type=Path, required=True, help="folder for the text tokenizer and vocabulary.json")
    text.add_argument("--image-codes", type=int, metavar="N", help="Llama's: ids for picture codes (default: 8192)")
    text.add_argument(
        "--image-grid", type=_grid, metavar="ROWSxCOLUMNS", help="Llama's: codes of one picture (default: 32x32)"
    )
    text.add_argument("--replace", action="store_true", help="put it in the place of one that is in OUTPUT")
    image = commands.add_parser("image", help="import the VQ-GAN: vqgan.ckpt or a Hugging Face checkpoint")
    image.add_argument("source", type=Path, help="vqgan.ckpt, model.safetensors, or a folder that holds one of them")
    image.add_argument("--output", type=Path, required=True, help="folder for the image tokenizer")
    image.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of its arithmetic: fp32 gives the release's codes, bf16 is faster and differs (default %(default)s)",
    )
    export = commands.add_parser("export", help="write a text tokenizer as a Hugging Face folder with the same ids")
    export.add_argument("source", type=Path, help="folder of a text tokenizer, trained or imported")
    export.add_argument("--output", type=Path, required=True, help="folder for tokenizer.json and its settings")
    return parser


def _grid(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, such as 32x32") from None
    return rows, columns


def main(arguments: argparse.Namespace) -> None:
    """Run one of the subcommands."""
    {"text": _text, "image": _image, "export": _export}[arguments.command](arguments)


def _text(arguments: argparse.Namespace) -> None:
    # inside the commands, here and below: --help and wrong flags are answered without torch
    from megachameleon.tokens.text import require_no_tokenizer
    from megachameleon.tokens.text.importing import import_any_text_tokenizer

    # shards may have been made with the tokenizer that is there
    if not arguments.replace:
        require_no_tokenizer(arguments.output)
    tokenizer = import_any_text_tokenizer(
        arguments.source,
        arguments.output,
        num_image_codes=arguments.image_codes,
        image_grid=arguments.image_grid,
    )
    vocabulary = tokenizer.vocabulary
    print(f"{arguments.output}: {vocabulary.size:,} ids, {vocabulary.num_text_ids:,} of them text")


def _image(arguments: argparse.Namespace) -> None:
    from megachameleon.tokens.vq.importing import import_image_tokenizer

    with progress_bar("importing the image tokenizer", None):
        tokenizer = import_image_tokenizer(arguments.source, arguments.output, precision=arguments.precision)
    made = "image tokenizer" if tokenizer.can_decode else "image tokenizer without a decoder, which cannot draw,"
    print(f"{arguments.output}: {made} from {arguments.source}, {arguments.precision}")


def _export(arguments: argparse.Namespace) -> None:
    from megachameleon.tokens.text import TextTokenizer
    from megachameleon.tokens.text.huggingface import export_text_tokenizer

    export_text_tokenizer(TextTokenizer.load(arguments.source), arguments.output)
    print(f"{arguments.output}: tokenizer.json for tokenizers and transformers, with the ids of {arguments.source}")


if __name__ == "__main__":
    run_tool(main, parser())
