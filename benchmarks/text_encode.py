"""Text tokenizers of this project against the engines that they use, alone, in one process on the same text.

    python -m benchmarks.text_encode --input src/ --sentencepiece tokenizers/a --byte-level tokenizers/b

Each of several interleaved rounds encodes every text once, one call a text; the clock is this process's CPU time. The
bare engines are `SentencePieceProcessor.encode` and `tokenizers.Tokenizer.encode` of the same models.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from megachameleon.console import run_tool, tool_parser, track

Encode = Callable[[str], object]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser((__doc__ or "").partition("\n")[0], (__doc__ or "").splitlines()[2].strip())
    parser.add_argument("--input", nargs="+", required=True, help="raw sources")
    parser.add_argument("--sentencepiece", type=Path, help="a tokenizer folder with text.model")
    parser.add_argument("--byte-level", type=Path, help="a tokenizer folder with text.json")
    parser.add_argument("--megabytes", type=float, default=20.0, help="text to encode (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Encode and print a table."""
    # all contestants have one core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = _texts(arguments.input, int(arguments.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    pairs = _candidates(arguments)
    speeds: dict[str, list[float]] = {name: [] for name, _, _ in pairs}
    for _ in track(range(arguments.rounds), "rounds"):
        # interleaved: all meet the same load of the machine
        for name, encode, _ in pairs:
            start = time.process_time()
            for text in texts:
                encode(text)
            speeds[name].append(size / (time.process_time() - start) / 1e6)
    print(f"{len(texts):,} texts, {size / 1e6:.1f} MB; MB a second of one core, medians of {arguments.rounds} rounds")
    for name, _, bare in pairs:
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds[bare], strict=True))
        print(f"{name:36s} {statistics.median(speeds[name]):7.2f}   {ratio:6.2f} x {bare}")


def _texts(inputs: list[str], limit: int) -> list[str]:
    from megachameleon.data.records import BadRecord
    from megachameleon.data.sources import find_sources, read_source, texts_of

    texts: list[str] = []
    size = 0
    for source in find_sources(inputs):
        for record in read_source(source):
            if not isinstance(record, BadRecord) and size < limit:
                texts += texts_of(record)
                size += sum(len(text.encode()) for text in texts_of(record))
    return texts


def _candidates(arguments: argparse.Namespace) -> list[tuple[str, Encode, str]]:
    """Names, ways to encode, and the bare engine to compare with."""
    from megachameleon.tokens.text import TextTokenizer
    from megachameleon.tokens.text.byte_level_engine import ByteLevelEngine
    from megachameleon.tokens.text.sentencepiece_engine import SentencePieceEngine

    found: list[tuple[str, Encode, str]] = []
    if arguments.sentencepiece:
        ours = TextTokenizer.load(arguments.sentencepiece)
        assert isinstance(ours.engine, SentencePieceEngine)
        found.append(("sentencepiece", ours.engine.processor.encode, "sentencepiece"))
        found += _ours("sentencepiece", ours)
    if arguments.byte_level:
        ours = TextTokenizer.load(arguments.byte_level)
        assert isinstance(ours.engine, ByteLevelEngine)
        backend = ours.engine.backend
        found.append(("tokenizers", lambda text: backend.encode(text).ids, "tokenizers"))
        found.append(
            ("tokenizers, encode_batch_fast", lambda text: backend.encode_batch_fast([text])[0].ids, "tokenizers")
        )
        found += _ours("tokenizers", ours)
    if not found:
        raise ValueError("give --sentencepiece, --byte-level or both")
    return found


def _ours(engine: str, tokenizer: object) -> list[tuple[str, Encode, str]]:
    return [(f"ours on {engine}, {way}", getattr(tokenizer, way), engine) for way in ("encode", "encode_array")]


if __name__ == "__main__":
    run_tool(main, parser())
