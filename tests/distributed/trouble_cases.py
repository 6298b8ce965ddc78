"""Runs with trouble in them, for the worker processes."""

import json
from pathlib import Path
from unittest import mock

import torch
from cases import build_trainer

from megachameleon.parallel.context import parallel_context
from megachameleon.parallel.replicas import gather_parameters
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.callbacks.build import build_callbacks
from megachameleon.training.callbacks.metrics_file import METRICS_FILE
from megachameleon.training.health.guards import Guard, Verdict

BAD_SAMPLE = 44


class BadSample(Guard):
    """Notices a bad sample one step too late, and wants to go back to before it."""

    name = "bad_sample"

    def __init__(self, action):
        self.action, self.since = action, None

    def judge(self, event):
        if self.since is not None:
            since, self.since = self.since, None
            scale = 0.5 if self.action == "lower_lr" else 1.0
            return Verdict(action=self.action, reason=f"bad sample at step {since}", since=since, lr_scale=scale)
        if event.samples[0] <= BAD_SAMPLE < event.samples[1]:
            self.since = event.step
        return Verdict()

    def state_dict(self):
        return {"since": self.since}

    def load_state_dict(self, state):
        self.since = state.get("since")


class DieAfter(Callback):
    """Raises once the run has been rolled back and has done a step again."""

    def __init__(self):
        self.starts = 0

    def on_start(self, trainer):
        self.starts += 1

    def on_step(self, trainer, event):
        if self.starts > 1:
            raise KeyError("killed")


class Damage(Callback):
    """Flips a bit of the checkpoint after step 4 as soon as that after step 6 is there."""

    def on_step(self, trainer, event):
        if event.step == 7:
            trainer.checkpointer.wait()
            path = trainer.checkpointer.folder / "step_00000004/tensors_00000.safetensors"
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)


def run_with_a_bad_sample(config, action, *, dies, damaged=False):
    """Progress, lines of metrics, and final weights; what it was told where it failed."""
    callbacks = [*build_callbacks(config), *([DieAfter()] if dies else []), *([Damage()] if damaged else [])]
    with (
        mock.patch("megachameleon.training.trainer.build_guards", lambda config: [BadSample(action)]),
        parallel_context(config.parallel) as context,
    ):
        trainer = build_trainer(config, context, callbacks)
        try:
            trainer.run()
        except Exception as error:
            trainer.checkpointer.wait()
            return str(error)
        gather_parameters(trainer.state.model, config.parallel)
        path = Path(config.output_dir) / METRICS_FILE
        lines = [json.loads(line) for line in path.read_text().splitlines()] if context.is_main else []
        metrics = [(line["step"], line["loss"], line["lr"]) for line in lines if line["kind"] == "train"]
        return trainer.progress, metrics, [p.detach().clone() for m in trainer.state.model for p in m.parameters()]


def steps_with_a_nan(config, bad_rank, bad_step):
    """Weights and optimizer state before and after a step in which one rank's gradients are NaN, and its report."""
    from megachameleon.training import step as step_module

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        schedule, seen = step_module._run_schedule, []

        def poisoned(chunks, *arguments, forward_only, **named):
            sums = schedule(chunks, *arguments, forward_only=forward_only, **named)
            if len(seen) == bad_step and context.rank == bad_rank:
                for parameter in chunks[-1].parameters():  # a distributed optimizer looks at its own part only
                    parameter.main_grad.view(-1)[0] = torch.nan
            return sums

        with mock.patch.object(step_module, "_run_schedule", poisoned):
            for step in range(bad_step + 2):
                before = _state(trainer)
                report = step_module.train_step(
                    trainer.state, trainer.data.train, trainer.config, context, step=step, consumed=8 * step
                )
                changed = any(not torch.equal(a, b) for a, b in zip(before, _state(trainer), strict=True))
                seen.append((report.skipped, report.grad_norm == report.grad_norm, changed))
        return seen


def _state(trainer):
    """Copies of all that the update changes on this rank, and only what is its own part of the weights."""
    gather_parameters(trainer.state.model, trainer.config.parallel)
    tensors = [parameter for chunk in trainer.state.model for parameter in chunk.parameters()]
    for part in getattr(trainer.state.optimizer, "chained_optimizers", [trainer.state.optimizer]):
        for group in part.optimizer.param_groups if part.optimizer else ():
            tensors += group["params"]
            tensors += [
                value for p in group["params"] for value in part.optimizer.state[p].values() if torch.is_tensor(value)
            ]
    return [tensor.detach().clone() for tensor in tensors]
