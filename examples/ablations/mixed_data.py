"""Synthetic documents of a text and a picture, whose ids have unlike statistics, so that the modalities compete.

Text is predictable: words follow words by Zipf's law, and half of them repeat the word seven before. Codes of a picture
are nearly random, drawn from a broad palette that the text's first word names, except that seven in ten repeat the code
above. Both repeats need attention to be predicted, so a model whose attention breaks down shows it in the loss.
"""

from pathlib import Path

import numpy as np

from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=240, num_image_codes=256, image_grid=(4, 8))
NUM_DOCUMENTS = 6_000
NUM_TOPICS = 64
"""First words, each with a palette of codes."""
ZIPF = 1.6
"""Exponent of the words' frequencies."""
PERIOD, REPEATS = 7, 0.5
"""Of words: how far back the repeated one stands, and how often one is repeated."""
REPEATS_ABOVE = 0.7
"""How often a code repeats the one above."""


def write_data(folder: Path, num_documents: int = NUM_DOCUMENTS) -> None:
    """Write `tokenizer/vocabulary.json` and the shard `pairs/`, unless they are there."""
    if list((folder / "pairs").glob("*.json")):
        return
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    VOCABULARY.save(folder / "tokenizer")
    # one fixed set of documents; seeds of runs change weights and order alone
    random = np.random.default_rng(0)
    num_words = VOCABULARY.num_text_ids
    followers = np.stack([random.permutation(num_words) for _ in range(num_words)])
    shares = np.arange(1, num_words + 1) ** -ZIPF
    ranks = np.cumsum(shares / shares.sum())
    palettes = np.cumsum(random.dirichlet(np.full(VOCABULARY.num_image_codes, 0.3), size=NUM_TOPICS), axis=1)
    with ShardWriter(folder / "pairs" / "shard", VOCABULARY, tokenizer="t", image_tokenizer="i") as writer:
        for _ in range(num_documents):
            topic = int(random.integers(NUM_TOPICS))
            text = [word + VOCABULARY.text_start for word in _words(random, topic, followers, ranks)]
            picture = list(VOCABULARY.encode_image(_codes(random, palettes[topic])))
            # both orders, so that each modality has to be predicted from the other
            order = (text, picture) if random.random() < 0.5 else (picture, text)
            writer.add([VOCABULARY.bos, *order[0], *order[1], VOCABULARY.eos])
        writer.commit()


def _words(random: np.random.Generator, topic: int, followers: np.ndarray, ranks: np.ndarray) -> list[int]:
    words = [topic]
    for draw, repeats in random.random((int(random.integers(16, 48)), 2)):
        if len(words) >= PERIOD and repeats < REPEATS:
            words.append(words[-PERIOD])
        else:
            rank = min(int(np.searchsorted(ranks, draw)), len(ranks) - 1)
            words.append(int(followers[words[-1], rank]))
    return words


def _codes(random: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """int [codes_per_image], row by row."""
    rows, columns = VOCABULARY.image_grid
    codes = np.minimum(np.searchsorted(palette, random.random(rows * columns)), len(palette) - 1)
    for i in np.flatnonzero(random.random(rows * columns) < REPEATS_ABOVE):
        if i >= columns:
            codes[i] = codes[i - columns]
    return codes
