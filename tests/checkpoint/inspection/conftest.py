"""Checkpoints are those of the tests of the formats, written by hands that are not the converter's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
sys.path.insert(0, str(Path(__file__).parents[2] / "model"))

import pytest
import torch
from three_formats import KINDS, SHAPES, Case, write


@pytest.fixture(scope="session")
def inspected_case():
    """A tiny 34B (Swin order, 8 of 64 heads are key/value heads, 4 groups of QK-norm) in bf16."""
    return Case(SHAPES["34B"], torch.bfloat16)


@pytest.fixture(scope="session")
def formats(tmp_path_factory, inspected_case):
    """The same weights in each format: folders by kind; do not change them."""
    root = tmp_path_factory.mktemp("formats")
    return {kind: write(kind, root / kind, inspected_case) for kind in KINDS}
