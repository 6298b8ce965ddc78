"""Every format into every other and into itself: the same weights, bit for bit, and the same logits.

Each side is written and read without the converter, and computes its logits with its own mathematics: Meta's written
out, transformers', and our decoder.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from converting import convert_checkpoint
from three_formats import KINDS, SHAPES, TOLERANCE, Case, assert_holds, logits, write

pytest.importorskip("transformers", reason="an oracle of the tests only")


@pytest.fixture(scope="module", params=SHAPES)
def written(request, tmp_path_factory):
    """A case, and a checkpoint of it in each format."""
    case, folder = Case(SHAPES[request.param]), tmp_path_factory.mktemp("written")
    return case, {kind: write(kind, folder / kind, case) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_formats_as_written_compute_the_same(written, kind):
    """Before any conversion: so the sides that are compared below are sound."""
    case, folders = written
    torch.testing.assert_close(logits(kind, folders[kind], case), case.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_converted(written, source, target, tmp_path):
    case, folders = written
    converted = convert_checkpoint((source, target), folders[source], tmp_path / "converted")
    assert_holds(target, converted, case)
    torch.testing.assert_close(logits(target, converted, case), case.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("source", "target"), [("meta", "hf"), ("hf", "megatron"), ("megatron", "meta")])
def test_converted_and_rounded(written, source, target, tmp_path):
    """Each value once, to the nearest."""
    case, folders = written
    converted = convert_checkpoint((source, target), folders[source], tmp_path / "converted", dtype="bf16")
    assert_holds(target, converted, replace(case, dtype=torch.bfloat16))
    size = sum(path.stat().st_size for path in converted.rglob("*") if path.suffix in (".pth", ".safetensors"))
    assert size < 1.2 * 2 * case.model.num_parameters
