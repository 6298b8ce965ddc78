"""Fixtures that several rooms use."""

import os

if "MEGACHAMELEON_TEST_GPU" not in os.environ:  # `make test-gpu` sets it, for tests/gpu alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: layouts are compared on the CPU everywhere

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from tiny_corpus import corpus_overrides, write_corpus


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
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _config_builder(corpus, folder):
    from megachameleon.config import load_config

    def build(*overrides: str, output: str = "run"):
        return load_config("debug", [f"output_dir={folder / output}", *corpus_overrides(corpus), *overrides])

    return build


@pytest.fixture
def config(corpus, tmp_path):
    """Overrides to the debug preset -> a configuration over `corpus` with a fresh output folder."""
    return _config_builder(corpus, tmp_path)


@pytest.fixture(scope="module")
def module_config(corpus, tmp_path_factory):
    """Like `config`, for fixtures that live as long as a module."""
    return _config_builder(corpus, tmp_path_factory.mktemp("runs"))
