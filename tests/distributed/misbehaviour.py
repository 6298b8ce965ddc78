"""What a rank does wrong in the tests that bring a run down; each is called in every rank before the tool runs."""

import errno
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch


def _at_step(step, function):
    """Have `function()` called by this rank before optimizer step `step`, counted from 1, goes forward."""
    from megachameleon.training import trainer

    train_step = trainer.train_step

    def patched(*arguments, **named):
        if named["step"] + 1 == step:
            function()
        return train_step(*arguments, **named)

    trainer.train_step = patched


def _strike(struck, function):
    struck.touch()
    function()


def hang(rank: int, struck: Path):
    """Rank 1 never comes back from step 3."""
    if rank == 1:
        _at_step(3, partial(_strike, struck, lambda: time.sleep(1000)))


def fail(rank: int, struck: Path):
    """Rank 1 raises in step 3."""

    def explode():
        raise RuntimeError("disk on fire")

    if rank == 1:
        _at_step(3, partial(_strike, struck, explode))


def kill(rank: int, struck: Path):
    """Rank 1 is killed in step 3."""
    if rank == 1:
        _at_step(3, partial(_strike, struck, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def term(rank: int, struck: Path):
    """Rank 1 is asked to stop in step 3."""
    if rank == 1:
        _at_step(3, partial(_strike, struck, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def nan_for_ever(rank: int, struck: Path):
    """From step 3 on, rank 1's gradients are NaN."""
    from megachameleon.training import step as step_module

    if rank == 1:
        _at_step(3, struck.touch)
        finish = step_module._run_schedule

        def poisoned(chunks, *arguments, forward_only, **named):
            sums = finish(chunks, *arguments, forward_only=forward_only, **named)
            if struck.exists() and not forward_only:
                for parameter in chunks[0].parameters():
                    parameter.main_grad.fill_(torch.nan)
            return sums

        step_module._run_schedule = poisoned


def slow(rank: int, struck: Path):
    """Rank 1's forward passes take 0.3 s more from step 3 on: far more than a busy machine adds."""
    from megachameleon.training import losses

    if rank == 1:
        _at_step(3, struck.touch)
        inner = losses.ForwardClock.forward

        import contextlib

        @contextlib.contextmanager
        def slowed(self):
            with inner(self):
                if struck.exists():
                    time.sleep(0.3)
                yield

        losses.ForwardClock.forward = slowed


def kill_in_a_save(rank: int, struck: Path):
    """Rank 1 is killed while it writes its share of a checkpoint, and leaves no note of it."""
    from megachameleon.checkpoint import saving

    if rank == 1:
        saving.write_snapshot = lambda *_: _strike(struck, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_in_a_save(rank: int, struck: Path):
    """Rank 1 can write neither its share of a checkpoint nor a note that says so."""
    from megachameleon.checkpoint import saving

    def refuse(path, snapshot):
        struck.touch()
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    if rank == 1:
        saving.write_snapshot = refuse
        saving._leave_note = lambda *_: None
