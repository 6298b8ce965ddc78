"""The update against torch's own AdamW and clipping, from the same summed gradients."""

import pytest
import torch
from cases import build_trainer

from megachameleon.parallel.context import parallel_context
from megachameleon.parallel.optimizer import optimizer_step

NUM_TOKENS = 40


def fill_gradients(trainer, scale):
    """Sums over NUM_TOKENS labels; returns the means, by name."""
    generator = torch.Generator().manual_seed(0)
    means = {}
    for name, parameter in trainer.state.model[0].named_parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        means[name] = parameter.main_grad / NUM_TOKENS
    return means


def update(config, scale, *overrides):
    """Weights before and after two updates of our own, mean gradients, the norms that they report, Adam's state."""
    with parallel_context(config("training.precision=fp32").parallel) as context:
        trainer = build_trainer(config("training.precision=fp32", "optimizer.lr=1e-2", *overrides), context)
        before = {name: p.detach().clone() for name, p in trainer.state.model[0].named_parameters()}
        norms = []
        for _ in range(2):
            means = fill_gradients(trainer, scale)
            for group in trainer.state.optimizer.param_groups:
                group["lr"] = 1e-2
            norm = optimizer_step(trainer.state.optimizer, trainer.config.optimizer.clip_grad, torch.tensor(NUM_TOKENS))
            norms.append(float(norm))
        after = {name: p.detach().clone() for name, p in trainer.state.model[0].named_parameters()}
        adam = trainer.state.optimizer.optimizer.state.values()
        return before, after, means, norms, trainer.config.optimizer, list(adam)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scale", [0.01, 30.0], ids=["within the limit", "clipped"])
def test_gradients_are_divided_clipped_and_applied(config, backend, scale):
    before, after, means, norms, settings, _ = update(config, scale, f"kernels.optimizer={backend}")
    weights = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    adam = torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for expected in norms:
        for name, weight in weights.items():
            weight.grad = means[name].clone()
        assert float(torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_grad)) == pytest.approx(expected)
        adam.step()
    assert (norms[0] > settings.clip_grad) == (scale == 30.0)
    for name, weight in weights.items():
        torch.testing.assert_close(after[name], weight.detach(), rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(after[name], before[name])


def test_a_gradient_that_is_not_finite_changes_nothing(config):
    before, after, _, norms, _, adam = update(config, float("nan"))
    assert norms[0] != norms[0]
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    assert adam
    for state in adam:
        assert float(state["step"]) == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
