"""Verdicts of guards: going back and on with other samples, a lower rate, a stop."""

import json
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import build_trainer
from trouble_cases import BAD_SAMPLE, BadSample, run_with_a_bad_sample

from megachameleon.checkpoint import saving
from megachameleon.console import FailureError
from megachameleon.parallel.context import parallel_context
from megachameleon.training.callbacks.base import Callback

SETTINGS = ["training.num_steps=10", "training.validate_every=0", "checkpoint.every=2", "model.dropout=0.1"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "parallel.distributed_optimizer=true",
            "parallel.overlap_param_gather=true",
            "parallel.overlap_grad_reduce=true",
        ],
    ],
)
def test_a_rolled_back_run_resumes_to_the_same_numbers(workers, config, overrides):
    ranks = 2 if overrides else 1
    calm = config(*SETTINGS, *overrides, output="calm")
    [(progress, metrics, weights), *_] = workers.run(ranks, run_rollback, calm, False)
    # The bad sample is in step 6 (40 to 47), noticed at step 7: back to step 4 (32 samples), on with sample 56.
    [skipped] = progress.skipped
    assert (skipped.first, skipped.last, skipped.reason) == (32, 55, "bad sample at step 6")
    assert skipped.first <= BAD_SAMPLE <= skipped.last
    assert (progress.step, progress.consumed_samples, progress.rollbacks) == (10, 56 + 6 * 8, 1)
    assert [step for step, _, _ in metrics] == list(range(1, 11))

    killed = config(*SETTINGS, *overrides, output="killed")
    assert all("killed" in told for told in workers.run(ranks, run_rollback, killed, True))
    found = sorted(path.name for path in (Path(killed.output_dir) / "checkpoints").glob("step_*"))
    assert found[-1] == "step_00000004"  # step 6 was saved with the bad sample in it
    [(resumed, its_metrics, its_weights), *_] = workers.run(ranks, run_rollback, killed, False)
    clocks = {"callbacks": {}}
    assert replace(resumed, **clocks) == replace(progress, **clocks) and its_metrics == metrics
    assert all(torch.equal(a, b) for a, b in zip(its_weights, weights, strict=True))
    entries = [json.loads(line) for line in (Path(killed.output_dir) / "rollbacks.jsonl").read_text().splitlines()]
    assert [(entry["from_step"], entry["to_step"]) for entry in entries] == [(7, 4), (7, 4)]


def run_rollback(config, dies):
    return run_with_a_bad_sample(config, "rollback", dies=dies)


def run_action(config, action):
    return run_with_a_bad_sample(config, action, dies=False)


def test_a_lower_rate_lasts(workers, config):
    settings = [*SETTINGS, "training.num_steps=9", "optimizer.decay=constant", "optimizer.warmup_steps=0"]
    [(progress, metrics, _)] = workers.run(1, run_action, config(*settings), "lower_lr")
    assert progress.lr_factor == 0.5
    assert [round(lr / metrics[0][2], 6) for _, _, lr in metrics] == [1] * 7 + [0.5] * 2


@pytest.mark.parametrize(
    ("action", "overrides", "told"),
    [
        ("stop", [], "bad sample at step 6; stopped, the last checkpoint is untouched"),
        ("rollback", ["checkpoint.every=100"], "no checkpoint is older than step 6: set checkpoint.every lower"),
        ("rollback", ["faults.max_rollbacks=0"], "stopped, since faults.max_rollbacks=0 roll-backs were made already"),
        (
            "rollback",
            ["data.stages=[{weights: {pairs: 1}, samples: 85}]"],
            "rolled back to step 4, but data.stages: hold 85",
        ),
    ],
)
def test_what_ends_the_run(workers, config, action, overrides, told):
    [text] = workers.run(1, run_action, config(*SETTINGS, *overrides), action)
    assert told in text


def run_damaged(config):
    return run_with_a_bad_sample(config, "rollback", dies=False, damaged=True)


def test_only_what_is_whole_is_rolled_back_to(workers, config):
    [(progress, _, _)] = workers.run(1, run_damaged, config(*SETTINGS, "checkpoint.keep_last=3"))
    [skipped] = progress.skipped
    assert (progress.step, skipped.first, skipped.last) == (10, 16, 55), "from step 2 on"


def test_nothing_is_deleted_for_a_checkpoint_that_is_damaged(workers, config):
    settings = config(*SETTINGS)
    [text] = workers.run(1, run_damaged, settings)
    assert "no checkpoint is older than step 6" in text and "keep_last higher" in text
    names = {path.name for path in (Path(settings.output_dir) / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000004.damaged", "step_00000006"}


class EndsBadly(Callback):
    def __init__(self):
        self.ends = 0

    def on_end(self, trainer):
        self.ends += 1
        raise OSError("no room for the last lines either")


def stop_while_saving(config):
    """Checkpoints that are there when a run ends that fails a step after a save which takes a while."""
    write = saving.write_snapshot
    with (
        mock.patch.object(saving, "write_snapshot", lambda *a: (time.sleep(1), write(*a))[1]),
        mock.patch("megachameleon.training.trainer.build_guards", lambda config: [BadSample("stop")]),
        parallel_context(config.parallel) as context,
    ):
        callbacks = [EndsBadly(), EndsBadly()]
        trainer = build_trainer(config, context, callbacks)
        with pytest.raises(FailureError, match="bad sample at step 6; stopped"):
            trainer.run()
        assert [callback.ends for callback in callbacks] == [1, 1]
        return {path.name for path in trainer.checkpointer.folder.iterdir()}


def test_a_run_that_a_guard_ends_finishes_its_checkpoint(workers, config):
    settings = config(*SETTINGS, "checkpoint.every=3")
    assert workers.run(2, stop_while_saving, settings)[0] == {"latest", "step_00000003", "step_00000006"}
