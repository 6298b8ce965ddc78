"""Train a text tokenizer and write it with its mixed-modal vocabulary."""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megachameleon.console import progress_bar, run_tool, tool_parser

if TYPE_CHECKING:
    from megachameleon.tokens.vocabulary import Vocabulary

EXAMPLES = """\
  # the demo's kind: 4,096 ids in all, of which 512 are codes of pictures of 8 x 8 codes
  python tools/train_text_tokenizer.py --input raw/ --output tokenizers/text --vocab-size 4096 \\
      --num-codes 512 --grid 8x8
  # Chameleon's layout: 65,536 ids, of which 8,192 are picture codes and 49,152 text
  python tools/train_text_tokenizer.py --input text.jsonl pairs.tar --output tokenizers/text --layout chameleon
  # the same as byte-level BPE, the kind of Chameleon's release
  python tools/train_text_tokenizer.py --input text.jsonl --output tokenizers/text --layout chameleon --kind byte-level
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="raw sources (see the data guide): files, folders, patterns or URLs")
    add("--output", type=Path, required=True, help="folder for the model, vocabulary.json and tokenizer.json")
    add(
        "--kind",
        choices=["sentencepiece", "byte-level"],
        default="sentencepiece",
        help="sentencepiece BPE, or byte-level BPE of the tokenizers library (default %(default)s)",
    )
    layout = parser.add_mutually_exclusive_group(required=True)
    layout.add_argument("--layout", choices=["chameleon"], help="a published layout")
    layout.add_argument(
        "--vocab-size",
        type=int,
        help="ids in all: text, picture codes and control ids; rounded up to a multiple of 64",
    )
    add("--num-codes", type=int, help="picture codes, with --vocab-size (default 8192)")
    add("--grid", type=_grid, help="rows x columns of codes in a picture, with --vocab-size (default 32x32)")
    add("--max-megabytes", type=float, default=200.0, help="text to train on; more is sampled (default %(default)s)")
    add(
        "--character-coverage",
        type=float,
        help="of sentencepiece: other characters become bytes (default 0.9999)",
    )
    add("--replace", action="store_true", help="put the tokenizer in the place of one that is in OUTPUT")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Sample the inputs' text, train, and write the folder."""
    from megachameleon.data.sources import find_sources
    from megachameleon.tokens.text import require_no_tokenizer
    from megachameleon.tokens.text.training import sample_texts, train_text_tokenizer

    vocabulary = _vocabulary(arguments)
    if not arguments.replace:
        require_no_tokenizer(arguments.output)
    coverage = arguments.character_coverage
    if arguments.kind == "byte-level" and coverage is not None:
        raise ValueError("--character-coverage is a setting of --kind sentencepiece; leave it out")
    texts = sample_texts(_texts(find_sources(arguments.input)), int(arguments.max_megabytes * 1e6))
    with progress_bar("training the text tokenizer", None) as bar:
        bar.note(f"{sum(map(len, texts)) / 1e6:.1f} M characters")
        if arguments.kind == "byte-level":
            from megachameleon.tokens.text.byte_level_training import train_byte_level

            tokenizer = train_byte_level(texts, vocabulary, arguments.output)
        else:
            settings = {} if coverage is None else {"character_coverage": coverage}
            tokenizer = train_text_tokenizer(texts, vocabulary, arguments.output, **settings)
    sample = texts[:2000]
    rate = sum(len(text.encode()) for text in sample) / max(1, sum(len(tokenizer.encode(text)) for text in sample))
    print(
        f"{arguments.output}: {vocabulary.size:,} ids, {vocabulary.num_text_ids:,} of them text; {rate:.2f} bytes an id"
    )


def _vocabulary(arguments: argparse.Namespace) -> "Vocabulary":
    from megachameleon.tokens.vocabulary import Vocabulary

    codes, grid = arguments.num_codes, arguments.grid
    if arguments.layout == "chameleon":
        if codes is not None or grid is not None:
            raise ValueError("--num-codes and --grid are settings beside --vocab-size; --layout chameleon has its own")
        return Vocabulary()
    codes = 8192 if codes is None else codes
    compact = partial(Vocabulary.compact, num_image_codes=codes, image_grid=grid or (32, 32))
    return compact(num_text_ids=max(1, arguments.vocab_size - compact(num_text_ids=64).text_start))


def _texts(sources: list[str]) -> Iterator[str]:
    from megachameleon.data.records import BadRecord
    from megachameleon.data.sources import file_size, read_source, texts_of

    bad = 0
    sizes = [file_size(source) or 0 for source in sources]
    with progress_bar("reading text", sum(sizes)) as bar:
        for source, size in zip(sources, sizes, strict=True):
            for record in read_source(source):
                if isinstance(record, BadRecord):
                    bad += 1
                else:
                    yield from texts_of(record)
            bar.advance(size)
    if bad:
        print(f"{bad} damaged records were left out", file=sys.stderr)


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, such as 32x32")
    return int(rows), int(columns)


if __name__ == "__main__":
    run_tool(main, parser())
