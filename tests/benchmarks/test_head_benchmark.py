"""The comparison of heads, tiny, through its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contestants import heads
from benchmarks.head import require_same

PROJECT = Path(__file__).parents[2]
TINY = "--device cpu --tokens 24 --hidden 16 --vocab 96 --precision fp32 --rounds 2 --warmup 0"


def benchmark(folder, *arguments):
    output = folder / "head.json"
    command = [sys.executable, "-m", "benchmarks.head", *TINY.split(), *arguments, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_all_heads_compute_the_same_and_ratios_follow_from_samples(tmp_path):
    result = benchmark(tmp_path)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["ours", "megatron-z", "megatron"]
    assert rows["ours"]["first_loss"] == pytest.approx(rows["megatron-z"]["first_loss"], rel=1e-5)
    assert rows["megatron"]["first_loss"] < rows["megatron-z"]["first_loss"]  # by the z-loss

    def seconds(name):
        return [sample["cpu_seconds"] for sample in result["samples"] if sample["contestant"] == name]

    pairs = zip(seconds("ours"), seconds("megatron"), strict=True)
    assert rows["megatron"]["ratio"]["most"] == pytest.approx(max(ours / theirs for ours, theirs in pairs))


@pytest.mark.slow
def test_memory_is_that_of_the_step(tmp_path):
    """24 x 49,152 fp32 logits are 4.5 MiB, and some of them must be held."""
    result = benchmark(tmp_path, "--vocab", "49152", "--contestants", "megatron", "--memory")
    assert 4.5 * 2**20 < result["rows"][0]["extra_bytes"] < 100 * 2**20


class Fake(heads.Head):
    """A head whose gradients are as they are told."""

    def __init__(self, *norms):
        self.norms = norms

    def gradient_norms(self):
        return self.norms


def test_heads_that_compute_something_else_are_not_compared():
    same = {"ours": Fake(1.0, 2.0), "megatron": Fake(1.001, 2.0)}
    require_same(same, {"ours": 5.0, "megatron": 5.01})
    with pytest.raises(ValueError, match="megatron computes another"):
        require_same(same, {"ours": 5.0, "megatron": 5.2})
    with pytest.raises(ValueError, match="megatron computes another"):
        require_same({**same, "megatron": Fake(1.0, 2.1)}, {"ours": 5.0, "megatron": 5.0})
