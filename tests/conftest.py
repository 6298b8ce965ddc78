"""Fixtures that several rooms use."""

import os

if "MEGACHAMELEON_TEST_GPU" not in os.environ:  # `make test-gpu` sets it, for tests/gpu alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: layouts are compared on the CPU everywhere

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def workers():
    """As many processes as the largest case so far has needed."""
    from pool import WorkerPool

    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tokenizer folder and shards of text and pictures for the debug preset (128 ids, 2 x 4 codes of 16)."""
    root = tmp_path_factory.mktemp("corpus")
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


def _config_builder(corpus, folder):
    from megachameleon.config import load_config

    def build(*overrides: str, output: str = "run"):
        base = [
            f"output_dir={folder / output}",
            f"data.tokenizer={corpus / 'tokenizer'}",
            f"data.train={{pairs: [{corpus / 'pairs'}], text: [{corpus / 'text'}]}}",
            f"data.validation={{all: [{corpus / 'valid'}]}}",
            "data.stages=[{weights: {pairs: 0.7, text: 0.3}, samples: 80}, {weights: {pairs: 1}}]",
            "logging.tensorboard=false",
        ]
        return load_config("debug", [*base, *overrides])

    return build


@pytest.fixture
def config(corpus, tmp_path):
    """Overrides to the debug preset -> a configuration over `corpus` with a fresh output folder."""
    return _config_builder(corpus, tmp_path)


@pytest.fixture(scope="module")
def module_config(corpus, tmp_path_factory):
    """Like `config`, for fixtures that live as long as a module."""
    return _config_builder(corpus, tmp_path_factory.mktemp("runs"))
