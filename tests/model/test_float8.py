"""FP8 products against exact ones. e4m3 keeps three bits: an operand is off by 2.6 % of its norm or so, a product by
3.7 %, so a product must miss by less than 5 % - and by more than 1 %, or it was no FP8."""

import pytest
import torch
from cases import train_steps

from megachameleon.config import load_config


def error(got, exact):
    return float((got - exact).norm() / exact.norm())


def emulated(a, b):
    """The same quantisation, multiplied in fp64."""
    from megachameleon.model.kernels.float8 import quantize_rows

    wide = [values.double() * scale for values, scale in (quantize_rows(a), quantize_rows(b))]
    return wide[0] @ wide[1].t()


@pytest.fixture
def operands():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(40, 64), torch.randn(48, 64) * 0.02, torch.randn(40, 48) * 1e-4
    x[3] *= 300  # an outlier among rows costs the others nothing
    return x, weight, grad


def test_rows_keep_three_bits():
    from megachameleon.model.kernels.float8 import quantize_rows

    x = torch.randn(30, 50) * torch.logspace(-6, 6, 30)[:, None]
    x[7] = 0
    values, scale = quantize_rows(x.t().contiguous().t())
    assert values.is_contiguous() and scale.shape == (30, 1)
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 2**10
    assert ((values.float() * scale - x).abs() <= x.abs() / 16 + 1e-30)[large].all()


def test_products(operands):
    from megachameleon.model.kernels import float8

    x, weight, grad = operands
    for got, exact, emulation in (
        (float8.output(x, weight), x @ weight.t(), emulated(x, weight)),
        (float8.input_gradient(grad, weight), grad @ weight, emulated(grad, weight.t())),
    ):
        assert error(got.double(), emulation) < 1e-5
        assert all(error(row, true) < 0.1 for row, true in zip(got, exact, strict=True))
        assert 0.01 < error(got, exact) < 0.05


def test_bfloat16_products_round_once(operands):
    from megachameleon.model.kernels import float8

    x, weight, _ = (t.bfloat16() for t in operands)
    got = float8.output(x, weight)
    assert got.dtype == torch.bfloat16
    assert error(got.double(), emulated(x, weight)) < 4e-3


def test_a_run_in_fp8_follows_the_one_in_bf16(workers, module_config):
    """Weight gradients are not FP8, but see what FP8 has made of the activations."""
    runs = {
        fp8: workers.run(1, train_steps, module_config("training.precision=bf16", f"kernels.fp8={fp8}"), 2)[0]
        for fp8 in ("none", "scaled_mm")
    }
    for mine, plain in zip(runs["scaled_mm"][0], runs["none"][0], strict=True):
        assert mine["loss"] == pytest.approx(plain["loss"], rel=0.01)
        assert mine["loss"] != plain["loss"]
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert 0.005 < error(runs["scaled_mm"][1][name], runs["none"][1][name]) < 0.15


def test_tensor_parallel_fp8_equals_one_process(workers, module_config):
    """Rows are whole in a column layer; a row layer's halves have scales of their own, which moves FP8's rounding."""
    config = ["kernels.fp8=scaled_mm", "training.precision=bf16"]
    one = workers.run(1, train_steps, module_config(*config), 1)[0]
    two = workers.run(2, train_steps, module_config(*config, "parallel.tensor_parallel=2"), 1)[0]
    assert two[0][0]["loss"] == pytest.approx(one[0][0]["loss"], rel=5e-3)


TE = ["kernels.linear=transformer_engine", "training.precision=bf16"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kernels.fp8=scaled_mm", "kernels.linear=reference"], "kernels.linear=torch or apex, not reference"),
        (["kernels.fp8=te_delayed"], "needs kernels.linear=transformer_engine, not auto"),
        (["kernels.fp8=scaled_mm", "model.ffn_hidden_size=200"], "model.ffn_hidden_size.* is 200"),
        (["kernels.fp8=scaled_mm", "training.precision=fp32"], "training.precision=bf16"),
        (
            [*TE, "kernels.fp8=te_delayed", "logging.drawing.prompts=[a dog]"],
            "logging.drawing.prompts",
        ),
        ([*TE, "kernels.fp8=te_delayed", "parallel.recompute=selective"], "layernorm out of"),
        ([*TE, "kernels.userbuffers=true"], "parallel.tensor_parallel > 1"),
        (["kernels.attention=transformer_engine", "parallel.context_parallel=2"], "context_parallel=2"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("debug", overrides)
