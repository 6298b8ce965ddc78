"""Small vocabularies, documents and shards."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megachameleon.data.shards import Dataset, ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary


@pytest.fixture
def vocabulary() -> Vocabulary:
    """128 ids, pictures of 2 x 2 codes of 8."""
    return Vocabulary.compact(num_text_ids=113, num_image_codes=8, image_grid=(2, 2))


@pytest.fixture
def make_document(vocabulary: Vocabulary) -> Callable[..., np.ndarray]:
    """A function that makes a document: positive numbers are runs of text, 0 is a picture."""

    def make(*segments: int, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        parts = [np.array([vocabulary.bos])]
        for length in segments:
            if length:
                parts.append(random.integers(vocabulary.text_start, vocabulary.size, length))
            else:
                parts.append(vocabulary.encode_image(random.integers(0, 8, vocabulary.codes_per_image)))
        return np.concatenate([*parts, [vocabulary.eos]])

    return make


@pytest.fixture
def write_shard(vocabulary: Vocabulary) -> Callable[[Path, Sequence[np.ndarray]], Dataset]:
    """A function that writes documents as a shard and opens it."""

    def write(prefix: Path, documents: Sequence[np.ndarray]) -> Dataset:
        with ShardWriter(prefix, vocabulary, tokenizer="t" * 16, image_tokenizer="i" * 16) as writer:
            for document in documents:
                writer.add(document)
            writer.commit()
        return Dataset.open(prefix)

    return write
