"""The live panel, as text, and lines where there is no terminal."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from megachameleon.config import HealthConfig
from megachameleon.training.callbacks.panel import PanelState, duration, panel
from megachameleon.training.callbacks.terminal import Terminal
from megachameleon.training.callbacks.throughput import Throughput
from megachameleon.training.health.guards import Verdict
from megachameleon.training.health.spikes import SpikeGuard
from megachameleon.training.losses import LossReport

LOSSES = LossReport(
    loss=4.25, loss_text=2.5, loss_image=6.125, log_z=1.75, log_z_squared=3.1, num_tokens=64, num_image_tokens=32
)


def event(step, skipped=None):
    report = SimpleNamespace(losses=LOSSES, grad_norm=0.5, lr=1e-4, skipped=skipped, monitors={"output_norm/text": 31})
    return SimpleNamespace(
        step=step, report=report, seconds=2.0, samples=(8, 16), tokens=512, tokens_per_second=1234.0, memory_bytes=3e9
    )


@pytest.fixture
def shown(config):
    """A terminal callback after a step, and its trainer."""

    def make(**console):
        run = config("training.log_every=2")
        trainer = SimpleNamespace(
            config=run,
            context=SimpleNamespace(is_main=True, world_size=4, device=torch.device("cpu")),
            precision="bf16",
            step=0,
            kernels=SimpleNamespace(resolved=run.kernels),
        )
        callback = Terminal(Throughput(), Console(file=io.StringIO(), width=120, **console))
        callback.on_start(trainer)
        return callback, trainer

    return make


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr("megachameleon.training.callbacks.terminal.describe_kernels", lambda *_: [("a", "b", "c")])


def text_of(renderable, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_panel_shows_what_is_known():
    values = {
        **{"loss": 4.25, "loss_text": 2.5, "loss_image": float("nan"), "log_z": 1.75, "grad_norm": 0.5},
        **{"output_norm": 30.5, "output_norm/text": 31.0, "output_norm/image": 29.0, "seconds": 2.0},
        **{"time/forward": 0.5, "time/backward": 1.0, "tokens_per_second": 1234567.0, "memory_mb": 71_234.0},
        **{"mfu_causal": 0.412, "mfu_full_attention": 0.443, "eta_hours": 75.5, "gpu_hours": 1280.0, "cost": 2560.0},
    }
    state = PanelState(title="runs/cats", step=250, num_steps=1000, values=values)
    state.validation, state.checkpoint = "at step 200: all 4.300", "at step 200: runs/cats/checkpoints/step_00000200"
    state.warnings.append("step 240: loss is nan; not updated; samples 8 to 15")
    text = text_of(panel(state))
    for part in (
        *("runs/cats", "step 250 of 1,000", "25.0 %", "ready in 3 d 3 h", "4.2500", "2.5000", "1.7500", "30.5", "29"),
        *("1,234,567", "41.2%", "44.3%", "71.2 GB", "1,280.00", "2,560.00", "25%", "50%", "at step 200: all 4.300"),
        *("step_00000200", "! step 240: loss is nan; not updated; samples 8 to 15"),
    ):
        assert part in text, part
    assert "pictures -" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_a_narrow_panel_stays_in_its_width():
    state = PanelState(title="t", step=1, num_steps=2, values={"loss": 1.0, "tokens_per_second": 1e6})
    state.warnings.append("w" * 300)
    assert max(map(len, text_of(panel(state), width=80).splitlines())) <= 80


def test_nothing_is_known_before_the_first_step():
    assert "step 0 of 10" in text_of(panel(PanelState(title="t", step=0, num_steps=10)))


@pytest.mark.parametrize(
    ("hours", "text"),
    [(float("nan"), "-"), (1 / 3600, "1 s"), (0.5, "30 min"), (1.5, "1 h 30 min"), (24 * 12 + 3.2, "12 d 3 h")],
)
def test_durations(hours, text):
    assert duration(hours) == text


def test_a_terminal_shows_the_panel(shown):
    callback, trainer = shown(force_terminal=True)
    callback.on_step(trainer, event(1))
    callback.on_checkpoint(trainer, 1, "here")
    callback.on_trouble(trainer, event(1, skipped="loss is nan"), Verdict())
    callback.on_end(trainer)
    text = callback._console.file.getvalue()
    for part in ("6.1250", "here", "step 1: loss is nan; not updated; samples 8 to 15"):
        assert part in text


def test_elsewhere_there_are_lines(shown, capsys):
    callback, trainer = shown()
    for step in (1, 2):
        callback.on_step(trainer, event(step))
    callback.on_trouble(trainer, event(2), Verdict(action="rollback", reason="step 2: loss leapt"))
    callback.on_end(trainer)
    assert capsys.readouterr().err.splitlines() == [
        "step 2/20 loss 4.250 (text 2.500, image 6.125) 1,234 tok/s",
        "warning: step 2: loss leapt (rollback)",
    ]


def test_a_trouble_is_told_once(shown, capsys):
    """Guards name the step, its samples and why it was left out; the terminal adds nothing to that."""
    callback, trainer = shown()
    guard = SpikeGuard(HealthConfig(), batch_size=8, stage_ends=(), look_up="look up")
    for step in (1, 2):
        trouble = event(step, skipped="loss 9.31 is beyond 4.92")
        callback.on_trouble(trainer, trouble, guard.judge(trouble))
    assert capsys.readouterr().err.splitlines() == [
        f"warning: step {step}: loss 9.31 is beyond 4.92; not updated; samples 8 to 15 (look up 8)" for step in (1, 2)
    ]
