"""The comparison of conversion with copying, tiny, through its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.conversion import Turn, copy_durably, summarise, watched_memory
from benchmarks.resident import private_bytes

PROJECT = Path(__file__).parents[2]


def test_every_direction_is_measured_and_nothing_stays(tmp_path):
    command = [sys.executable, "-m", "benchmarks.conversion", "--preset", "debug", "--rounds", "1", "--shard-size"]
    command += ["0.01", "--tensor-parallel", "2", "--directions", "megatron-hf", "hf-megatron", "--cold"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "found.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["hf-megatron", "megatron-hf", "copy-hf", "copy-megatron"]
    assert len(found["turns"]) == 4 and all(turn["seconds"] > 0 < turn["num_bytes"] for turn in found["turns"])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def turn(name, number, seconds, workers=1, layers=1):
    return Turn(
        layers=layers, workers=workers, name=name, round=number, seconds=seconds, num_bytes=10**9, peak_bytes=10**8
    )


def test_ratios_are_of_speeds_in_the_same_round_and_of_the_same_source():
    turns = [turn("hf-meta", 1, 2), turn("hf-meta", 2, 4), turn("copy-hf", 1, 1, 0), turn("copy-hf", 2, 8, 0)]
    turns += [turn("copy-meta", 1, 100, 0), turn("hf-meta", 1, 50, layers=2)]
    row = summarise(turns, 1, 5 * 10**7)[0]
    assert row["name"] == "hf-meta" and (row["ratio"]["least"], row["ratio"]["most"]) == (0.5, 2)
    assert row["megabytes_per_second"]["median"] == 375 and row["peak_gigabytes"] == 0.1


def test_copies_are_equal_and_memory_is_seen(tmp_path):
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "inner" / "file").write_bytes(b"x" * 5000)
    copy_durably(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "file").read_bytes() == b"x" * 5000
    with watched_memory(private_bytes()) as peak:
        held = bytearray(os.urandom(1 << 20) * 32)
        for _ in range(50):
            sum(held[: 1 << 18])
    assert peak[0] == pytest.approx(32 << 20, rel=0.5)
