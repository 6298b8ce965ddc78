"""The decoder against an implementation that is not ours: transformers' Chameleon with the same weights, in fp32.

1e-5 on logits of order one: the two sum in another order. A wrong model must miss by 0.1 and more.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import parallel_context
from plain_weights import CASES, build_filled, decoder_logits, decoder_state, draw, draw_tokens, run_decoder

from megachameleon.config import load_config

pytest.importorskip("transformers", reason="an oracle of the tests only: pip install -r requirements-dev.txt")


def ask_oracle(case):
    """Overrides of a case, random weights, and transformers' logits."""
    from huggingface_oracle import huggingface_logits

    model = load_config("debug", CASES[case]).model
    weights = draw(model)
    with torch.no_grad():
        logits = huggingface_logits(model, weights, draw_tokens(model))
    assert 0.5 < logits.std() < 2
    return CASES[case], weights, logits


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return ask_oracle(request.param)


@pytest.fixture(scope="module")
def grouped():
    return ask_oracle("swin, 4 groups")


def test_logits(case):
    overrides, weights, expected = case
    torch.testing.assert_close(run_decoder(overrides, weights), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, True), (4, False)])
def test_logits_under_tensor_parallelism(grouped, workers, size, sequence_parallel):
    """Two ranks hold two QK-norm groups each, four ranks one each."""
    overrides, weights, expected = grouped
    layout = [f"parallel.tensor_parallel={size}", f"parallel.sequence_parallel={sequence_parallel}"]
    parts = workers.run(size, run_decoder, [*overrides, *layout], weights)
    torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=0, atol=1e-5)


def test_qk_norm_averaged_over_groups_misses(grouped):
    overrides, weights, expected = grouped
    averaged = {
        name: tensor.mean(0, keepdim=True).expand_as(tensor) if "_norm." in name else tensor
        for name, tensor in weights.items()
    }
    assert (run_decoder(overrides, averaged) - expected).abs().max() > 0.1


def test_another_eps_or_rope_base_misses(case):
    overrides, weights, expected = case
    for change in ("model.norm_eps=1e-6", "model.rope_theta=5000"):
        assert (run_decoder([*overrides, change], weights) - expected).abs().max() > 0.1, change


def test_gradients(case):
    """Of the likelihood of a few labels, with respect to every parameter."""
    from huggingface_oracle import huggingface_logits

    overrides, weights, _ = case
    config = load_config("debug", overrides)
    tokens = draw_tokens(config.model)
    where, labels = torch.tensor([0, 3, 17, 22]), tokens[:, [1, 4, 18, 23]].flatten()

    def loss(logits):
        return F.cross_entropy(logits[:, where].flatten(0, 1), labels, reduction="sum")

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    loss(huggingface_logits(config.model, leaves, tokens)).backward()
    expected = decoder_state({name: leaf.grad for name, leaf in leaves.items()}, config.model)
    with parallel_context(config.parallel) as context:
        decoder = build_filled(config, context, weights)
        loss(decoder_logits(decoder, tokens)).backward()
    for name, parameter in decoder.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: {error}"
