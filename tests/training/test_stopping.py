"""What asks a run to stop. Real signals to whole runs: test_run_comes_down.py and tests/faults."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cases import build_trainer

from megachameleon.parallel.context import parallel_context
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.stopping import OUT_OF_TIME, Listener, StoppedError, StopRequests, TimeLimit, listen


def test_time_is_counted_from_the_start_of_the_job(monkeypatch):
    now = time.time()
    assert not TimeLimit(100, now).reached()
    assert TimeLimit(100, now - 86).reached(), "a tenth for a checkpoint of unknown size, and 5 s"
    assert not TimeLimit(None, now - 1e9).reached()
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now - 3600)))
    assert TimeLimit(1000).reached() and not TimeLimit(10_000).reached()


def test_time_for_another_step_and_a_checkpoint_is_left(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limit = TimeLimit(100, time.time() - 60)
    for seconds in (0.0, 1.0, 20.0, 1.0):
        clock[0] += seconds
        limit.stepped()
    limit.saved(8.0)
    assert not limit.reached(), "60 + 20 + 1.5 x 8 + 5 = 97"
    limit.saved(11.0)
    assert limit.reached()


def test_handlers_are_there_for_the_run_only():
    before = signal.getsignal(signal.SIGTERM)
    with listen() as listener:
        listener.raises = False
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert listener.received == signal.SIGUSR1, "the first counts"
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


def test_before_processes_meet_a_signal_ends_the_run_at_once():
    with pytest.raises(StoppedError, match="SIGTERM"), listen():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("slept on")


STUCK = """
import hashlib
from megachameleon.training.stopping import listen
with listen() as listener:
    listener.raises = False
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, where no handler of Python runs
"""


def test_the_same_signal_again_ends_even_a_stuck_process():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # one request, delivered several times
                process.send_signal(number)
            time.sleep(1.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 128 + signal.SIGTERM
            assert process.stderr.read() == b"second SIGTERM: ended at once, nothing saved\n"
        finally:
            process.kill()


class Asks(Callback):
    """Has one rank asked to stop: when a step has ended, or while it validates."""

    def __init__(self, listener, step):
        self.listener, self.step, self.saved = listener, step, []

    def on_step(self, trainer, event):
        if event.step == self.step:
            self.listener.received = signal.SIGUSR1

    def on_checkpoint(self, trainer, step, path):
        self.saved.append(step)


def run_and_ask(config, rank, step):
    """Why the run stopped, the last step, and steps of the checkpoints."""
    with parallel_context(config.parallel) as context:
        listener = Listener()
        asks = Asks(listener if context.rank == rank else Listener(), step)
        trainer = build_trainer(config, context, [asks])
        trainer.requests.listener = listener
        try:
            trainer.run()
        except StoppedError as reason:
            return str(reason), trainer.step, asks.saved
        return "finished", trainer.step, asks.saved


SETTINGS = ["training.num_steps=6", "training.validate_every=0", "checkpoint.every=4"]


@pytest.mark.parametrize(
    ("asked_after", "overrides", "reason", "saved"),
    [
        (2, [], "SIGUSR1; step 3 is saved", [3]),
        (3, [], "SIGUSR1; step 4 is saved", [4]),  # due anyway: once, not twice
        (4, ["training.validate_every=4"], "SIGUSR1; step 4 is saved", [4]),  # while validating: nothing new to save
        (5, [], "finished", [4, 6]),  # at the last step
    ],
)
def test_all_ranks_stop_with_the_one_that_is_asked(workers, config, asked_after, overrides, reason, saved):
    results = workers.run(2, run_and_ask, config(*SETTINGS, *overrides), 1, asked_after)
    assert [result[:2] for result in results] == [(reason, saved[-1])] * 2
    assert results[0][2] == saved


def test_a_stop_file_is_obeyed_once(workers, config, tmp_path):
    settings = config(*SETTINGS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").write_text("maintenance at noon\nsecond line")
    assert workers.run(1, run_and_ask, settings, -1, 0) == [
        ("the file 'stop' (maintenance at noon); step 1 is saved", 1, [1])
    ]
    assert not (tmp_path / "run/stop").exists()
    assert workers.run(1, run_and_ask, settings, -1, 0) == [("finished", 6, [4, 6])]


def test_the_time_limit_stops_a_run(workers, config):
    [(reason, step, saved)] = workers.run(1, run_and_ask, config(*SETTINGS, "faults.max_duration=0.001"), -1, 0)
    assert (reason, step, saved) == ("faults.max_duration; step 1 is saved", 1, [1])


def seconds_of_saves(config):
    """What the time limit has been told, by the main process of a finished run."""
    with parallel_context(config.parallel) as context:
        trainer, seen = build_trainer(config, context), []
        trainer.requests.limit.saved = seen.append
        trainer.run()
        return seen


def test_the_time_limit_knows_how_long_checkpoints_take(workers, config):
    [seen] = workers.run(1, seconds_of_saves, config(*SETTINGS))
    assert len(seen) == 2 and all(seconds > 0 for seconds in seen)


def test_a_file_system_that_does_not_answer_is_no_request(tmp_path, monkeypatch):
    def stale(*arguments, **named):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    requests = StopRequests(tmp_path, is_main=True, max_duration=None, listener=Listener())
    monkeypatch.setattr(os, "stat", stale)
    assert requests.own() == 0


def test_only_the_main_process_looks_at_time_and_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000000000")
    (tmp_path / "stop").touch()
    others = StopRequests(tmp_path, is_main=False, max_duration=0.001, listener=Listener())
    assert others.own() == 0
    assert StopRequests(tmp_path, is_main=True, max_duration=0.001, listener=Listener()).own() == OUT_OF_TIME
    assert json.dumps(others.obeyed(OUT_OF_TIME)) == '"faults.max_duration"' and (tmp_path / "stop").exists()
