"""Training a text tokenizer: sentencepiece BPE for the text part of a mixed-modal vocabulary."""

import hashlib
import heapq
import io
import re
import string
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import sentencepiece

from megachameleon.tokens.text.sentencepiece_engine import RELEASE_PIECES, SentencePieceEngine
from megachameleon.tokens.text.tokenizer import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

MAX_SENTENCE_BYTES = 16_384
"""Of what the trainer reads at once."""
CUT = "\x1f"
"""Tells the trainer where no piece may cross; it is taken out of the text."""
FIXED_PIECES = 1 + 256 + len(RELEASE_PIECES)
"""Pieces that every model has: unknown, bytes, and those that stand alone."""


def sample_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """A sample of at most `max_bytes` of UTF-8, chosen by the texts' hashes: the same for any order of reading.

    One pass, bounded memory: what is kept are the texts with the smallest hashes, at least one.
    """
    kept: list[tuple[int, int, str]] = []  # a heap, the largest hash first
    total, limit = 0, 1 << 64
    for text in texts:
        encoded = text.encode(errors="replace")
        rank = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
        if rank < limit:
            heapq.heappush(kept, (-rank, len(encoded), text))
            total += len(encoded)
        while total > max_bytes and len(kept) > 1:
            largest, size, _ = heapq.heappop(kept)
            limit, total = -largest, total - size
    return [text for _, _, text in sorted(kept, reverse=True)]


def train_text_tokenizer(
    texts: Sequence[str], vocabulary: Vocabulary, folder: Path, *, character_coverage: float = 0.9999
) -> TextTokenizer:
    """Train BPE on `texts` to fill the text ids of `vocabulary`, and write the tokenizer folder.

    Text is cut as in Chameleon's release: digits, punctuation, tabs and newlines stand alone, spaces stand in fours and
    twos, a last one before its word. Other characters than the covered ones are spelled in bytes. The same texts give
    the same bytes.

    Args:
        character_coverage: share of the text's characters that get a piece of their own.

    Raises:
        ValueError: no text, or too little for so many ids, or too few ids for the characters.
    """
    model = io.BytesIO()
    if not any(_sentences(texts)):
        raise ValueError("text: the inputs hold no text to train a tokenizer on; check --input")
    if vocabulary.num_text_ids < FIXED_PIECES:
        raise ValueError(
            f"vocabulary: {vocabulary.num_text_ids} text ids, but bytes and whitespace alone take {FIXED_PIECES}; "
            f"use a vocabulary of {(vocabulary.text_start + FIXED_PIECES) // 64 * 64 + 128:,} ids or more"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            # one more: the unknown piece, which has no id of ours
            vocab_size=vocabulary.num_text_ids + 1,
            character_coverage=character_coverage,
            byte_fallback=True,
            # every text must come back, so nothing is normalised, put before it or taken away
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=sorted(RELEASE_PIECES),
            pretokenization_delimiter=CUT,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # the trainer leaves out longer ones
            max_sentence_length=MAX_SENTENCE_BYTES,
            shuffle_input_sentence=False,
            num_threads=1,  # the same bytes on any machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _too_many_or_too_few(str(error), vocabulary) from None
    tokenizer = TextTokenizer(SentencePieceEngine(model.getvalue(), vocabulary, "the trained model"), vocabulary)
    trained_on = {"texts": len(texts), "bytes": sum(len(text.encode(errors="replace")) for text in texts)}
    tokenizer.save(folder, {"trained_on": trained_on, "sentencepiece": sentencepiece.__version__})
    return tokenizer


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, with marks where no piece may cross, cut to what the trainer accepts."""
    longest = MAX_SENTENCE_BYTES // 6  # four bytes a character and two marks
    cuts = _cuts()
    for text in texts:
        for line in text.encode(errors="replace").decode().splitlines():
            for start in range(0, len(line), longest):
                yield line[start : start + longest].translate(cuts)


@cache
def _cuts() -> dict[int, str]:
    """For `str.translate`: digits and punctuation between marks, and what the trainer cannot read taken out.

    Punctuation and digits are those of the `tokenizers` library: all of ASCII's symbols, and Unicode's P* and N*.
    """
    symbols = {*string.punctuation, *(c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] in "PN")}
    return {**{ord(c): f"{CUT}{c}{CUT}" for c in symbols}, ord(CUT): "", 0: ""}


def _too_many_or_too_few(message: str, vocabulary: Vocabulary) -> ValueError:
    wanted = vocabulary.num_text_ids
    if found := re.search(r"value <= (\d+)", message):
        possible = int(found[1]) - 1
        return ValueError(
            f"text: too little for {wanted:,} text ids; at most {possible:,} can be learnt from it. Give more text, or "
            f"a vocabulary of {(vocabulary.text_start + possible) // 64 * 64:,} ids"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        needed = int(found[1])
        return ValueError(
            f"text: {wanted:,} text ids do not hold its characters, which take {needed:,}; use a vocabulary of "
            f"{-(-(vocabulary.text_start + needed) // 64) * 64:,} ids or more, or a lower character coverage"
        )
    return ValueError(f"text: sentencepiece could not train on it: {message.splitlines()[-1]}")
