"""One rank dies, hangs or goes bad: every rank ends, soon, and says why on one line."""

import json
import re

import pytest
from misbehaviour import fail, fail_in_a_save, hang, kill, kill_in_a_save, nan_for_ever, slow, term
from rank_lives import fork_server, live

from megachameleon.config import to_yaml

HANG_TIMEOUT = 3
SETTINGS = [
    "training.num_steps=12",
    "training.validate_every=0",
    "training.global_batch_size=4",
    "checkpoint.every=100",
    f"faults.hang_timeout={HANG_TIMEOUT}",
    "faults.start_timeout=40",
]


@pytest.fixture(scope="module")
def server():
    return fork_server()


@pytest.fixture
def run(server, config, tmp_path):
    def run(misbehave, *overrides, ranks=2):
        path = tmp_path / "run.yaml"
        path.write_text(to_yaml(config(*SETTINGS, *overrides)))
        return live(server, path, ranks, misbehave)

    return run


def errors(log):
    return [line for line in log.splitlines() if line.startswith("error: ")]


def test_a_killed_rank_is_named_by_the_others(run):
    ended = run(kill, "parallel.pipeline_parallel=2")
    assert ended.statuses == [1, -9], ended.logs
    [line] = errors(ended.logs[0])
    assert re.search(r"rank 1 \(.+\) died without a word", line) and "Traceback" not in ended.logs[0]
    assert ended.seconds < 60


def test_an_error_of_one_rank_is_told_by_all(run):
    ended = run(fail)
    assert ended.statuses == [1, 1], ended.logs
    [own], [others] = errors(ended.logs[1]), errors(ended.logs[0])
    assert re.match(r"error: rank 1 \(.+\) died after step 2: RuntimeError: disk on fire", own)
    assert re.match(r"error: rank 1 \(.+\) died after step 2: RuntimeError: disk on fire", others)
    assert ended.seconds < 60


def test_a_hung_rank_is_named_and_all_end(run, tmp_path):
    ended = run(hang, "parallel.tensor_parallel=2")
    assert ended.statuses == [1, 1], ended.logs
    for log in ended.logs:
        [line] = errors(log)
        assert re.search(r"not finished with step 3: rank 1 \(.+\) is in <lambda> \(misbehaviour.py:\d+\)", line)
    [stacks] = (tmp_path / "run/failures").glob("*/rank-00001.stacks")
    assert "misbehaviour.py" in stacks.read_text()
    assert HANG_TIMEOUT <= ended.seconds < HANG_TIMEOUT + 60


def test_a_rank_with_nan_stops_all_without_touching_the_checkpoint(run, tmp_path):
    ended = run(nan_for_ever, "checkpoint.every=2", "training.num_steps=20")
    assert ended.statuses == [1, 1], ended.logs
    [line] = errors(ended.logs[0])
    assert "gradient norm is nan" in line
    assert not (tmp_path / "run/checkpoints/step_00000020").exists()


def test_a_stopped_run_goes_on_and_a_finished_one_says_so(run, tmp_path):
    ended = run(term)
    assert ended.statuses == [75, 75], ended.logs
    assert "stopped: SIGTERM; step 3 is saved" in ended.logs[0] and "stopped" not in ended.logs[1]
    assert run(None).statuses == [0, 0]
    again = run(None)
    assert again.statuses == [0, 0] and "already finished at step 12" in again.logs[0]
    heartbeat = json.loads((tmp_path / "run/heartbeat.json").read_text())
    assert {name: heartbeat[name] for name in ("state", "step", "num_steps")} == {
        "state": "finished", "step": 12, "num_steps": 12,
    }  # fmt: skip


def test_a_slow_rank_is_named_once(run):
    ended = run(slow, "faults.straggler_window=4", "training.num_steps=16")
    assert ended.statuses == [0, 0], ended.logs
    named = [line for line in ended.logs[0].splitlines() if "is slow" in line]
    assert len(named) == 1 and re.match(r"rank 1 \(.+\) is slow: forward passes take \d+ ms a step", named[0])


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_rank_that_is_killed_in_a_save_is_not_waited_for(run, asynchronous):
    """At the end of a run the main process waits for the files of all ranks, and for nothing else."""
    ended = run(kill_in_a_save, "training.num_steps=3", f"checkpoint.asynchronous={asynchronous}")
    assert ended.statuses == [1, -9], ended.logs
    [line] = errors(ended.logs[0])
    assert re.search(r"rank 1 \(.+\) died without a word", line)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_rank_that_can_write_nothing_at_all_is_not_waited_for(run, asynchronous):
    ended = run(fail_in_a_save, "training.num_steps=3", f"checkpoint.asynchronous={asynchronous}")
    # Rank 0 hears of it from rank 1 (2), or on a busy machine finds it gone and looks for its last words (1).
    assert ended.statuses[0] in (1, 2) and ended.statuses[1] == 2, ended.logs
    for log in ended.logs:
        [line] = errors(log)
        assert "permission is denied" in line and "rank 1" in line, line
