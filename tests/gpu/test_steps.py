"""Whole training steps on one GPU: every choice learns what the plain one learns."""

import warnings

import pytest
import torch
from cases import build_trainer
from cases_gpu import DEVICE

WIDE = ["model.hidden_size=128", "model.num_attention_heads=4", "model.ffn_hidden_size=256", "training.precision=bf16"]
CHOICES = {
    "automatic": [],
    "apex": ["kernels.linear=apex", "kernels.optimizer=apex"],
    "liger": ["kernels.swiglu=liger"],
    "transformer engine": [
        f"kernels.{operation}=transformer_engine"
        for operation in ("norm", "qk_norm", "attention", "linear", "optimizer")
    ],
    "scaled_mm": ["kernels.fp8=scaled_mm"],
    "delayed": ["kernels.linear=transformer_engine", "kernels.fp8=te_delayed"],
    "tensorwise": ["kernels.linear=transformer_engine", "kernels.fp8=te_tensorwise"],
}
PLAIN = [
    f"kernels.{operation}=reference" for operation in ("embedding", "norm", "qk_norm", "rotary", "attention", "swiglu")
]
PLAIN += [f"kernels.{operation}=reference" for operation in ("linear", "loss", "optimizer")]


def steps(config, context, count=4):
    """Losses of the first steps, the gradient norms, and the warnings of the last step."""
    from megachameleon.training.step import train_step

    try:
        trainer = build_trainer(config, context)
    except ValueError as error:
        if "is not installed" in str(error) or "needs a GPU of" in str(error):
            pytest.skip(str(error))
        raise
    reports = []
    for step in range(count):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step == count - 1 else "default")
            consumed = step * config.training.global_batch_size
            state, samples = trainer.state, trainer.data.train
            reports.append(train_step(state, samples, trainer.config, context, step=step, consumed=consumed))
            torch.cuda.set_sync_debug_mode("default")
    return reports, [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@pytest.mark.parametrize("choice", CHOICES)
def test_learns_what_the_plain_kernels_learn(config, one_gpu, choice):
    reports, _ = steps(config(*WIDE, *CHOICES[choice]), one_gpu)
    plain, _ = steps(config(*WIDE, *PLAIN), one_gpu)
    for got, expected in zip(reports, plain, strict=True):
        assert got.losses.loss == pytest.approx(expected.losses.loss, rel=2e-2)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=0.15)


@pytest.mark.parametrize("choice", ["automatic", "liger", "scaled_mm"])
def test_a_step_waits_for_the_device_once(config, one_gpu, choice):
    """CUDA's own word for what tests/training/test_host_reads.py counts on the CPU."""
    _, waits = steps(config(*WIDE, *CHOICES[choice]), one_gpu)
    assert len(waits) == 1, waits


def test_the_gpu_agrees_with_the_plain_kernels_in_fp32(config, one_gpu):
    torch.backends.cuda.matmul.allow_tf32 = False
    fast, _ = steps(config(*WIDE, "training.precision=fp32"), one_gpu, count=2)
    plain, _ = steps(config(*WIDE, *PLAIN, "training.precision=fp32"), one_gpu, count=2)
    for got, expected in zip(fast, plain, strict=True):
        assert got.losses.loss == pytest.approx(expected.losses.loss, rel=1e-4)
    assert one_gpu.device.type == DEVICE
