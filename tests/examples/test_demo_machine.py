"""How many processes the demo takes."""

import pytest

from examples.demo import run_demo


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [(0, None, 2), (0, 1, 1), (0, 4, 4), (1, None, 1), (2, 2, 2), (3, None, 2), (8, None, 4), (8, 1, 1)],
)
def test_processes(monkeypatch, gpus, processes, expected):
    monkeypatch.setattr(run_demo, "count_gpus", lambda: gpus)
    assert run_demo.find_machine(processes).processes == expected


@pytest.mark.parametrize(
    ("gpus", "processes", "message"),
    [(1, 2, r"2 is more than the 1 GPU"), (2, 4, r"4 is more than the 2 GPU"), (0, 0, "at least 1"), (0, 3, "divide")],
)
def test_processes_that_cannot_work_are_refused(monkeypatch, gpus, processes, message):
    monkeypatch.setattr(run_demo, "count_gpus", lambda: gpus)
    with pytest.raises(ValueError, match=f"--processes: .*{message}"):
        run_demo.find_machine(processes)
