"""Going back to a checkpoint before trouble, and on with the samples after it.

A roll-back is a function of the reports and of the checkpoints. So there is nothing to remember about it but what the
next checkpoint holds: a run that is killed before then resumes from the same checkpoint, meets the same trouble and
rolls back again, to the same numbers. For this, checkpoints of the abandoned steps are deleted before anything else.
"""

import json
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from megachameleon.checkpoint.folder import step_of
from megachameleon.console import FailureError
from megachameleon.parallel.replicas import gather_parameters
from megachameleon.training.batches import require_enough_samples
from megachameleon.training.health.guards import Verdict
from megachameleon.training.progress import SkippedSamples

if TYPE_CHECKING:
    from megachameleon.training.callbacks.base import StepEvent
    from megachameleon.training.trainer import Trainer

ROLLBACKS_FILE = "rollbacks.jsonl"


def roll_back(trainer: "Trainer", event: "StepEvent", verdict: Verdict) -> None:
    """Load the newest checkpoint of before the trouble, and leave out all samples from there to where the trouble was.

    Raises:
        FailureError: there is no such checkpoint, there were too many roll-backs, or the data do not reach.
    """
    since = event.step if verdict.since is None else verdict.since
    most = trainer.config.faults.max_rollbacks
    if trainer.progress.rollbacks >= most:
        raise FailureError(f"{verdict.reason}; stopped, since faults.max_rollbacks={most} roll-backs were made already")
    gather_parameters(trainer.state.model, trainer.config.parallel)  # nothing may arrive after the weights are loaded
    checkpoint = trainer.checkpointer.newest_before(since)
    if checkpoint is None:
        raise FailureError(
            f"{verdict.reason}; stopped, since no checkpoint is older than step {since}: set checkpoint.every lower "
            "or checkpoint.keep_last higher"
        )
    trainer.checkpointer.delete_after(step_of(checkpoint))  # only now, when it is known to be whole
    # Now, since loading puts the checkpoint's progress in the place of ours.
    rollbacks, end = trainer.progress.rollbacks + 1, event.samples[1]
    lr_factor = trainer.progress.lr_factor * verdict.lr_scale
    trainer.load(checkpoint)
    skipped = SkippedSamples(first=trainer.progress.consumed_samples, last=end - 1, reason=verdict.reason)
    trainer.progress = replace(
        trainer.progress,
        consumed_samples=end,
        skipped=(*trainer.progress.skipped, skipped),
        rollbacks=rollbacks,
        lr_factor=lr_factor,
    )
    try:
        require_enough_samples(trainer.data, trainer.config.training, done=trainer.step, consumed=end)
    except ValueError as error:
        raise FailureError(f"{verdict.reason}; rolled back to step {trainer.step}, but {error}") from error
    if trainer.context.is_main:
        _log(trainer, event.step, skipped)


def _log(trainer: "Trainer", at: int, skipped: SkippedSamples) -> None:
    """On the terminal, and in a file that is never cut back as the metrics are."""
    line = f"rolled back from step {at} to {trainer.step}; samples {skipped.first} to {skipped.last} are left out"
    print(f"{line}: {skipped.reason}", file=sys.stderr, flush=True)
    entry = {"time": round(time.time(), 3), "from_step": at, "to_step": trainer.step, **asdict(skipped)}
    with (trainer.folder / ROLLBACKS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
