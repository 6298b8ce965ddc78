"""Peers do the whole of a step."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.batches import RandomSamples
from benchmarks.contestants import plain
from benchmarks.contestants.base import Settings
from benchmarks.contestants.torch_training import cross_entropy
from benchmarks.same_weights import Weights
from benchmarks.shapes import Shape

CPU = torch.device("cpu")
SHAPE = Shape(layers=1, hidden=16, heads=2, kv_groups=1, ffn=32, vocab=64, sequence_length=8)


def build(precision, variant=""):
    settings = Settings(
        shape=SHAPE,
        precision=precision,
        context=SimpleNamespace(device=CPU),
        samples=RandomSamples(SHAPE, 1, 0),
        documents=1,
        peer_z_loss=False,
        overrides=(),
    )
    contestant = plain.build(settings, variant=variant)
    contestant.load(Weights(SHAPE, 0, CPU))
    return contestant


def test_gradients_are_clipped():
    contestant = build("fp32")
    contestant.module.head.weight.data *= 100  # a loss with large gradients
    norms = []
    contestant.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters_of(optimizer)]))
    )
    contestant.step(0)
    assert float(norms[0]) == pytest.approx(1.0, abs=1e-4)


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(("variant", "dtype"), [("autocast", torch.float32), ("", torch.bfloat16)])
def test_what_bf16_means(variant, dtype):
    contestant = build("bf16", variant)
    contestant.step(0)
    kept = [state[name].dtype for state in contestant.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {p.dtype for p in contestant.module.parameters()} == set(kept) == {dtype}
    assert contestant.module.cos.dtype == torch.float32


def test_cross_entropy_and_log_z():
    logits, labels = torch.randn(2, 3, 64), torch.randint(64, (2, 3))
    nll, log_z = cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten(), expected)
    torch.testing.assert_close(log_z, logits.logsumexp(-1))
