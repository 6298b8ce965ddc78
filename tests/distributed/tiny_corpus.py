"""Shards of text and pictures that are written in a moment, for the debug preset."""

from pathlib import Path

import numpy as np

from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary


def write_corpus(root: Path) -> Path:
    """A tokenizer folder and shards `pairs`, `text` and `valid` under `root` (128 ids, 2 x 4 codes of 16)."""
    vocabulary = Vocabulary.compact(num_text_ids=100, num_image_codes=16, image_grid=(2, 4))
    assert vocabulary.size == 128
    (root / "tokenizer").mkdir()
    vocabulary.save(root / "tokenizer")
    random = np.random.default_rng(0)
    for name, count, has_picture in (("pairs", 120, True), ("text", 60, False), ("valid", 11, True)):
        with ShardWriter(root / name / "shard", vocabulary, tokenizer="t", image_tokenizer="i") as writer:
            for _ in range(count):
                topic = int(random.integers(0, 20))
                words = np.arange(random.integers(3, 40)) * (topic + 1) % vocabulary.num_text_ids
                ids = [vocabulary.bos, *(words + vocabulary.text_start)]
                if has_picture:
                    ids += list(vocabulary.encode_image((np.arange(8) * topic) % 16))
                writer.add([*ids, vocabulary.eos])
            writer.commit()
    return root


def corpus_overrides(root: Path) -> list[str]:
    """What makes a configuration read the corpus."""
    return [
        f"data.tokenizer={root / 'tokenizer'}",
        f"data.train={{pairs: [{root / 'pairs'}], text: [{root / 'text'}]}}",
        f"data.validation={{all: [{root / 'valid'}]}}",
        "data.stages=[{weights: {pairs: 0.7, text: 0.3}, samples: 80}, {weights: {pairs: 1}}]",
        "logging.tensorboard=false",
    ]
