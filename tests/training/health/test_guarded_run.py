"""Guards in real runs: what they keep from the weights, and that a resumed run remembers what they knew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build_trainer
from whole import gather

from megachameleon.console import FailureError
from megachameleon.parallel.context import parallel_context
from megachameleon.training.agreement import StepLimits
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.health.guards import Guard

BASE = [
    *("training.num_steps=31", "health.spike_window=16", "training.validate_every=0", "checkpoint.every=100"),
    "data.stages=[{weights: {pairs: 0.7, text: 0.3}}]",
]
BAD_STEP = 29


class Corrupted:
    """Samples of which those of one step have labels that nobody could have written."""

    def __init__(self, samples, positions):
        self.samples, self.positions = samples, positions

    def __getattr__(self, name):
        return getattr(self.samples, name)

    def batch(self, positions, /):
        batch = self.samples.batch(positions)
        for row, position in enumerate(positions):
            if position in self.positions:
                batch.labels[row] = np.random.default_rng(position).integers(0, 128, batch.labels.shape[1])
        return batch


class RefusesOneStep(Guard):
    """Lets every step update but one."""

    name = "refuses_one"

    def __init__(self):
        self.asked = 0

    def limits(self):
        self.asked += 1
        return StepLimits(loss=-1.0) if self.asked == BAD_STEP else StepLimits()


class Troubles(Callback):
    def __init__(self):
        self.reasons, self.rates, self.meddle = [], [], None

    def on_step(self, trainer, event):
        self.rates.append(event.report.lr)
        if self.meddle:
            self.meddle(trainer, event.step)

    def on_trouble(self, trainer, event, verdict):
        self.reasons.append(verdict.reason)


def run_with(config, *, corrupted, guard=None):
    """Final parameters and what was said, of a run with or without the bad step."""
    troubles = Troubles()
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context, [troubles])
        if corrupted:
            size = config.training.global_batch_size
            bad = range((BAD_STEP - 1) * size, BAD_STEP * size)
            trainer.data = replace(trainer.data, train=Corrupted(trainer.data.train, bad))
        if guard is not None:
            trainer.guards = [guard()]
        trainer.run()
        return gather(trainer.state.model, context, gradients=False), troubles.reasons


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_corrupt_batch_leaves_no_trace(workers, config, world_size):
    """The run equals, bit for bit, one on clean data that leaves out the update of that step."""
    seen, reasons = workers.run(world_size, run_corrupted, config(*BASE, output="corrupted"))[0]
    assert len(reasons) == 1 and f"step {BAD_STEP}: loss " in reasons[0] and "samples 224 to 231" in reasons[0]
    without, _ = workers.run(world_size, run_without_the_step, config(*BASE, output="without"))[0]
    assert set(seen) == set(without)
    assert all(torch.equal(seen[name], without[name]) for name in seen)
    harmed, _ = workers.run(world_size, run_corrupted, config(*BASE, "health.spike_policy=log", output="harmed"))[0]
    assert not all(torch.equal(seen[name], harmed[name]) for name in seen), "the batch would have left a trace"


def run_corrupted(config):
    return run_with(config, corrupted=True)


def run_without_the_step(config):
    return run_with(config, corrupted=False, guard=RefusesOneStep)


def memories(config):
    """What the guards know at the end of a run, and of one that was resumed on the way."""
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        trainer.run()
        return {guard.name: guard.state_dict() for guard in trainer.guards}


def test_a_resumed_run_remembers_what_guards_knew(workers, config):
    base = ["training.num_steps=24", "health.spike_window=32", "checkpoint.every=12", "training.validate_every=0"]
    base += ["optimizer.decay=constant"]
    [whole] = workers.run(1, memories, config(*base, output="whole"))
    workers.run(1, memories, config(*base, "training.num_steps=12", output="cut"))
    [resumed] = workers.run(1, memories, config(*base, output="cut"))
    # the window began anew with the second stage, at step 10
    assert len(whole["spikes"]["losses"]) == 14 and whole["early_warning"]
    assert resumed == whole


def progress_of(config, *, corrupted=False, meddle=None):
    """Progress, what was said, and the learning rates of a run; `meddle` is called after each step."""
    troubles = Troubles()
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context, [troubles])
        if corrupted:
            size = config.training.global_batch_size
            bad = range((BAD_STEP - 1) * size, BAD_STEP * size)
            trainer.data = replace(trainer.data, train=Corrupted(trainer.data.train, bad))
        troubles.meddle = meddle
        try:
            trainer.run()
        except FailureError as error:
            return trainer.progress, [*troubles.reasons, f"FailureError: {error}"], troubles.rates
        return trainer.progress, troubles.reasons, troubles.rates


@torch.no_grad()
def break_weights(trainer, step):
    if step == 19:
        for parameter in trainer.state.model[0].parameters():
            parameter.fill_(float("nan"))


@torch.no_grad()
def enlarge_outputs(trainer, step):
    if step == 40 and not trainer.progress.rollbacks:
        for name, parameter in trainer.state.model[0].named_parameters():
            if name.endswith(("linear_fc2.weight", "linear_proj.weight")):
                parameter.mul_(8)
        trainer.state.optimizer.reload_model_params()


def roll_back_by_policy(config):
    return progress_of(config, corrupted=True)


def break_down(config):
    return progress_of(config, meddle=break_weights)


def outgrow(config):
    return progress_of(config, meddle=enlarge_outputs)


def test_a_spike_rolls_back_by_policy(workers, config):
    """To the checkpoint of step 20; the samples since then are never trained on."""
    settings = config(*BASE, "checkpoint.every=10", "health.spike_policy=rollback")
    [(progress, reasons, _)] = workers.run(1, roll_back_by_policy, settings)
    assert len(reasons) == 1 and reasons[0].startswith(f"step {BAD_STEP}: loss ")
    [skipped] = progress.skipped
    assert (skipped.first, skipped.last) == (160, 231) and skipped.reason == reasons[0]
    assert progress.step == 31 and progress.consumed_samples == 232 + 11 * 8


def test_what_stays_not_finite_stops_the_run(workers, config):
    [(progress, reasons, _)] = workers.run(1, break_down, config(*BASE, "health.max_skips_in_a_row=2"))
    assert [reason.partition(";")[0] for reason in reasons[:3]] == [f"step {n}: loss is nan" for n in (20, 21, 22)]
    assert reasons[3].startswith("FailureError: step 22: loss is nan") and "max_skips_in_a_row=2" in reasons[3]
    assert progress.step == 22


@pytest.mark.parametrize("policy", ["lower_lr", "rollback"])
def test_an_early_warning_lowers_the_rate(workers, config, policy):
    """The output projections of all blocks are made eight times as large behind step 40."""
    settings = config(
        "training.num_steps=62",
        "optimizer.decay=constant",
        f"health.early_warning={policy}",
        "training.validate_every=0",
        "checkpoint.every=15",
    )
    [(progress, reasons, rates)] = workers.run(1, outgrow, settings)
    [alarm] = [reason for reason in reasons if reason.startswith("early warning at step ")]
    assert "output_norm/text grew" in alarm and "output_norm/image grew" in alarm
    assert progress.lr_factor == 0.5
    step = int(alarm.split()[4].rstrip(":"))
    assert 41 <= step <= 56
    assert rates[step - 1] == 1e-2 and rates[step] == 5e-3
    if policy == "rollback":  # the growth does not come again
        saved = (step - 21) // 15 * 15  # the newest checkpoint of before the measurements that the alarm is based on
        assert [(skipped.first, skipped.last) for skipped in progress.skipped] == [(saved * 8, step * 8 - 1)]
        assert len(rates) == step + 62 - saved
