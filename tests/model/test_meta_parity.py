"""The decoder against the mathematics of the released checkpoints."""

import pytest
import torch
from meta_oracle import NORMS, ROWS, halves_apart, meta_logits
from plain_weights import CASES, draw, draw_tokens, run_decoder

from megachameleon.config import load_config


@pytest.fixture(scope="module", params=CASES)
def case(request):
    overrides = CASES[request.param]
    model = load_config("debug", overrides).model
    weights = draw(model, seed=2)
    expected = meta_logits(model, weights, draw_tokens(model))
    assert 0.5 < expected.std() < 2
    return overrides, weights, expected


def test_logits(case):
    overrides, weights, expected = case
    logits = run_decoder(overrides, halves_apart(weights, *ROWS, *NORMS))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("permuted", [ROWS, NORMS, ()], ids=["rows only", "norms only", "nothing"])
def test_half_a_permutation_misses(case, permuted):
    overrides, weights, expected = case
    logits = run_decoder(overrides, halves_apart(weights, *permuted) if permuted else weights)
    assert (logits - expected).abs().max() > 0.1
