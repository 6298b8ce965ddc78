"""Steps that were never trained, for guards to judge."""

import json
import math

from megachameleon.training.agreement import Agreement, why_skipped
from megachameleon.training.callbacks.base import StepEvent
from megachameleon.training.losses import LossReport
from megachameleon.training.step import StepReport

BATCH = 4


def event_of(step, loss, grad_norm=1.0, *, log_z=5.0, limits=None, monitors=None, lr=1e-3):
    """Step `step` (from 1) with these measurements, left out if it is not finite or beyond `limits`."""
    agreement = Agreement(stop=False, loss=loss, grad_norm=grad_norm, busy_seconds=(0.0,))
    losses = LossReport(
        loss=loss,
        loss_text=loss,
        loss_image=loss,
        log_z=log_z,
        log_z_squared=log_z**2,
        num_tokens=64,
        num_image_tokens=32,
    )
    bad = not math.isfinite(loss + grad_norm)
    skipped = why_skipped(agreement, limits) if limits is not None else ("loss is nan" if bad else None)
    report = StepReport(
        losses=losses, grad_norm=grad_norm, lr=lr, skipped=skipped, monitors=monitors or {}, agreement=agreement
    )
    return StepEvent(
        step=step,
        report=report,
        seconds=1.0,
        samples=((step - 1) * BATCH, step * BATCH),
        tokens=step,
        tokens_per_second=1.0,
        memory_bytes=1,
    )


def judge_all(guard, events):
    """Verdicts of steps given as (loss, grad_norm), each bounded by what the guard allows before it."""
    return [guard.judge(event_of(i + 1, loss, norm, limits=guard.limits())) for i, (loss, norm) in enumerate(events)]


def through_json(guard, other):
    """`other` with the memory of `guard`, as a checkpoint would bring it back."""
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    return other
