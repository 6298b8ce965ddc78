"""Guards in real runs: what they keep from the weights, and that a resumed run remembers what they knew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build_trainer
from whole import gather

from megachameleon.parallel.context import parallel_context
from megachameleon.training.agreement import StepLimits
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.health.guards import Guard

BASE = ["training.num_steps=32", "health.spike_window=16", "training.validate_every=0", "checkpoint.every=100"]
BAD_STEP = 30


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
        self.reasons = []

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


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_corrupt_batch_leaves_no_trace(workers, config, world_size):
    """The run equals, bit for bit, one on clean data that leaves out the update of that step."""
    seen, reasons = workers.run(world_size, run_corrupted, config(*BASE, output="corrupted"))[0]
    assert len(reasons) == 1 and f"step {BAD_STEP}: loss " in reasons[0] and "samples 232 to 239" in reasons[0]
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
    assert len(whole["spikes"]["losses"]) == 14 and whole["early_warning"]["trends"]
    assert resumed == whole
