"""The short form of the fault harness: one trial of each kind. `make test-faults` runs hundreds at random moments."""

import os
import subprocess
from pathlib import Path

import pytest
from faults import Fault
from harness import Harness
from trial import damage


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("faults") / "runs", [])


def survives(harness, layout, *disturbances):
    """The trial, after checking that its run ended as the calm one."""
    expected, _ = harness.calm(layout)
    survives.number = getattr(survives, "number", 0) + 1
    trial = harness.disturb(survives.number, layout, list(disturbances), expected)
    assert trial.problem is None, "\n".join([trial.problem, *trial.done, trial.lives[-1].log])
    return trial


KILLS = {
    "while the index is read": ("one", Fault(kind="SIGKILL", rank=0, place="index", call=2)),
    "in a step, and again while loading": (
        "DP2-distributed",
        Fault(kind="SIGKILL", rank=0, place="step", call=6, delay=0.01),
        Fault(kind="SIGKILL", rank=1, place="load"),
    ),
    "while files of a checkpoint become durable": ("TP2-SP", Fault(kind="SIGKILL", rank=0, place="fsync", call=17)),
    "while a checkpoint becomes visible": ("one", Fault(kind="SIGKILL", rank=0, place="rename", call=2)),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_as_if_nothing_had_been(harness, name):
    layout, *faults = KILLS[name]
    trial = survives(harness, layout, *faults)
    assert len(trial.lives) == len(faults) + 1
    assert all(-9 in life.statuses for life in trial.lives[:-1])


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(harness, kind):
    trial = survives(harness, "TP2-SP", Fault(kind=kind, rank=1, place="step", call=4, delay=0.005))
    assert trial.lives[0].statuses == (75, 75)
    assert len(trial.lives) == 2


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(harness, how):
    kill = Fault(kind="SIGKILL", rank=0, place="step", call=9)
    trial = survives(harness, "one", kill, damage(how, seed=len(how)))
    _, damaged, name = trial.done[1].partition(f"{how} ")
    assert damaged and name.split("/")[0] in trial.lives[1].log, trial.lives[1].log


def test_a_full_disk_costs_nothing_but_the_stop(harness):
    trial = survives(harness, "TP2-SP", Fault(kind="no_room", rank=1, place="save", call=2))
    first = trial.lives[0]
    assert all(first.statuses), first.statuses
    assert "No space left on device" in first.log and "checkpoints" in first.log


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk of its own")
def test_a_disk_that_is_really_full(harness):
    """On a tmpfs of 6 MB that a ballast file fills up before the third checkpoint."""
    folder = harness.folder / "trial-9999"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        expected, _ = harness.calm("one")
        trial = harness.disturb(9999, "one", [Fault(kind="no_room", rank=0, place="save", call=3)], expected)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert trial.problem is None, "\n".join([trial.problem, *trial.done, trial.lives[-1].log])
    assert "No space left on device" in trial.lives[0].log


def test_a_difference_would_be_found(harness):
    from trial import LAYOUTS, difference, outcome_of

    assert LAYOUTS
    calm, _ = harness.calm("one")
    folder: Path = harness.folder / "calm-one" / "run"
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text()
    assert difference(outcome_of(folder), calm) is None
    metrics.write_text(lines.replace('"step": 7,', '"step": 8,', 1))
    assert "metrics differ" in difference(outcome_of(folder), calm)
    metrics.write_text(lines)
