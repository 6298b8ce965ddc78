import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megachameleon.data.preprocessing.worker_pool import WorkerDiedError, WorkerPool

REPOSITORY = Path(__file__).parents[2]


def make_work(factor: int):
    def work(task: int | str):
        if task == "sleep":
            time.sleep(60)
        if isinstance(task, str):
            raise ValueError(f"{task} is no number")
        if task % 50 == 0:
            time.sleep(0.05)  # later tasks overtake
        return task * factor, os.getpid()

    return work


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(make_work, (10,), 2) as pool:
        yield pool


def test_results_come_in_order_and_drawing_stays_a_little_ahead(pool):
    drawn = []
    results = pool.ordered(drawn.append(i) or i for i in range(200))
    for number, (value, _) in enumerate(results):
        assert value == 10 * number
        assert len(drawn) <= number + 1 + 6 + 1
    assert number == 199
    here = WorkerPool(make_work, (10,), 1)
    assert [value for value, _ in here.ordered(range(5))] == [0, 10, 20, 30, 40]


def test_errors_come_in_their_place_and_the_pool_lives_on(pool):
    results = pool.ordered([1, 2, "three", 4])
    assert [next(results)[0], next(results)[0]] == [10, 20]
    with pytest.raises(ValueError, match="three is no number"):
        next(results)

    results = pool.ordered([1, lambda: "cannot be sent", 3])
    assert next(results)[0] == 10
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        next(results)

    def tasks():
        yield 1
        raise OSError("the source is gone")

    results = pool.ordered(tasks())
    assert next(results)[0] == 10
    with pytest.raises(OSError, match="the source is gone"):
        next(results)
    with closing(pool.ordered(iter(range(10**9)))) as endless:
        assert next(endless)[0] == 0
    processes = {process for _, process in pool.ordered(range(100))}
    assert len(processes) == 2 and os.getpid() not in processes


def test_a_worker_that_dies_is_noticed_at_once_whatever_the_others_do():
    with WorkerPool(make_work, (1,), 2) as pool:
        processes = {process for _, process in pool.ordered(range(20))}
        assert len(processes) == 2
        results = pool.ordered([1, "sleep", 2, *["sleep"] * 20])
        assert next(results)[0] == 1
        start = time.monotonic()
        os.kill(processes.pop(), signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match=r"worker \d died \(killed by signal 9; out of memory\?\)") as error:
            next(results)
        assert "finished units stay: run again" in str(error.value)
        assert time.monotonic() - start < 10
        assert next(pool.ordered([3]))[0] == 3  # with new processes


class Unmakeable:
    """Cannot be made anew from its pickle."""

    def __reduce__(self):
        return int, ("no number",)


def make_unmakeable():
    return lambda task: Unmakeable()


def test_a_result_that_cannot_be_taken_over_is_an_error_and_no_wait():
    with (
        WorkerPool(make_unmakeable, (), 2) as pool,
        pytest.raises(ValueError, match="invalid literal for int"),
    ):
        list(pool.ordered(range(9)))


def test_a_worker_that_cannot_start_says_why():
    with WorkerPool(make_work, (1, "one too many"), 2) as pool, pytest.raises(TypeError, match="positional argument"):
        list(pool.ordered([1]))


def test_impossible_numbers_of_workers_are_refused():
    with pytest.raises(ValueError, match="--workers 0: must be at least 1"):
        WorkerPool(make_work, (1,), 0)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(how, tmp_path):
    script = """
import os, pathlib, signal, sys, time
from megachameleon.data.preprocessing.worker_pool import WorkerPool
def make():
    return work
def work(name):
    pathlib.Path(name).write_text(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with WorkerPool(make, (), 2) as pool:
        list(pool.ordered(["a", "b"]))
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    files = [tmp_path / "a", tmp_path / "b"]
    _wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    parent.send_signal(how)
    assert parent.wait(timeout=20) == (143 if how == signal.SIGTERM else -9)
    workers = [int(file.read_text()) for file in files]
    _wait_until(lambda: not any(_alive(process) for process in workers))


def _wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE
