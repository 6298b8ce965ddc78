"""MFU, cost, time left, and time that was of use."""

from types import SimpleNamespace

import pytest
import torch

from megachameleon.config import load_config
from megachameleon.training.callbacks import throughput as throughput_module
from megachameleon.training.callbacks.flops import PEAK_TFLOPS, flops_per_token, peak_flops
from megachameleon.training.callbacks.throughput import Throughput


class Clock:
    now = 1_000_000.0

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput_module, "time", clock)
    return clock


def trainer_of(config, step=0):
    context = SimpleNamespace(is_main=True, world_size=4, device=torch.device("cpu"))
    return SimpleNamespace(config=config, context=context, step=step, monitors=[])


def step(callback, trainer, clock, number, *, seconds=10.0, lost=0.0):
    clock.now += seconds + lost
    callback.on_step(trainer, SimpleNamespace(step=number, seconds=seconds, tokens_per_second=51.2))


@pytest.mark.parametrize(
    ("preset", "causal", "full"), [("chameleon_7b", 43.69, 46.91), ("chameleon_34b", 212.20, 221.86)]
)
def test_flops_of_chameleon(preset, causal, full):
    """GFLOP a token at 4,096 positions, worked out by hand from the published shapes."""
    counted = flops_per_token(load_config(preset, []).model, 4096)
    assert counted == pytest.approx((causal * 1e9, full * 1e9), rel=1e-3)


def test_the_planner_counts_alike():
    from megachameleon.planning.flops import flops_of
    from megachameleon.planning.shapes import TransformerShape

    model = load_config("chameleon_34b", []).model
    parts = flops_of(TransformerShape.from_model(model, 4096))
    assert flops_per_token(model, 4096) == pytest.approx((parts.total("causal"), parts.total("full")))


def test_mfu_is_that_of_one_device(config, clock):
    run = config("logging.peak_tflops=1e-6")
    callback, trainer = Throughput(), trainer_of(run)
    callback.on_start(trainer)
    step(callback, trainer, clock, 1)
    causal, full = flops_per_token(run.model, run.data.sequence_length)
    assert callback.values["mfu_causal"] == pytest.approx(causal * 51.2 / 4 / 1e6)
    assert callback.values["mfu_full_attention"] == pytest.approx(full * 51.2 / 4 / 1e6)


def test_a_cpu_has_no_mfu(config, clock):
    callback, trainer = Throughput(), trainer_of(config())
    callback.on_start(trainer)
    step(callback, trainer, clock, 1)
    assert "mfu_causal" not in callback.values and "cost" not in callback.values


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("Some other", None),
    ],
)
def test_devices_are_known_by_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(torch.device("cuda"), 0.0) == expected
    assert peak_flops(torch.device("cuda"), 5.0) == 5e12
    assert tflops is None or tflops in PEAK_TFLOPS.values()


def test_bill_and_time_left(config, clock):
    callback, trainer = Throughput(), trainer_of(config("logging.price_per_gpu_hour=2"))
    callback.on_start(trainer)
    for number in (1, 2):
        step(callback, trainer, clock, number, seconds=1800)
    assert callback.values["gpu_hours"] == pytest.approx(4)
    assert callback.values["cost"] == pytest.approx(8)
    assert callback.values["eta_hours"] == pytest.approx(18 * 0.5)
    assert callback.values["effective_time"] == pytest.approx(1)


def test_restarts_are_paid_and_counted_as_lost(config, clock):
    """Saved after step 1, died after step 2 was done too; an hour later step 2 is done again."""
    first, trainer = Throughput(), trainer_of(config())
    first.on_start(trainer)
    step(first, trainer, clock, 1, seconds=1000)
    saved = first.state_dict()
    step(first, trainer, clock, 2, seconds=1000)
    clock.now += 3000
    second, trainer = Throughput(), trainer_of(config(), step=1)
    second.load_state_dict(saved)
    second.on_start(trainer)
    step(second, trainer, clock, 2, seconds=1000)
    assert second.values["effective_time"] == pytest.approx(2000 / 6000)
    assert second.values["gpu_hours"] == pytest.approx(4 * 2000 / 3600)
    assert second.values["eta_hours"] == pytest.approx(18 * 1000 / 3600)


def test_a_rollback_takes_back_what_was_useful_only(config, clock):
    callback, trainer = Throughput(), trainer_of(config())
    callback.on_start(trainer)
    step(callback, trainer, clock, 1, seconds=1000)
    saved = callback.state_dict()
    step(callback, trainer, clock, 2, seconds=1000)
    callback.load_state_dict(saved)
    callback.on_start(trainer)
    step(callback, trainer, clock, 2, seconds=1000)
    assert callback.values["effective_time"] == pytest.approx(2 / 3)
    assert callback.values["gpu_hours"] == pytest.approx(4 * 3000 / 3600)
