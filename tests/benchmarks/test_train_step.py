"""The comparison of training steps, tiny, through its command line."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train_step import main, make_parser

PROJECT = Path(__file__).parents[2]
TINY = "--layers 2 --hidden 64 --heads 4 --kv-groups 2 --ffn 96 --vocab 256 --sequence-length 32 --precision fp32"
CONTESTANTS = ["ours", "plain", "megatron"]
if importlib.util.find_spec("transformers"):
    CONTESTANTS.append("huggingface")


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.train_step", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "result.json"
    names = ("--contestants", *CONTESTANTS)
    packed = ("--documents", "3", "--micro-batch-size", "2", "--peer-z-loss")
    done = benchmark(*TINY.split(), *packed, *names, "--rounds", "2", "--warmup", "0", "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ratio" in done.stdout
    return json.loads(output.read_text())


def losses(result, name):
    return [sample["loss"] for sample in result["samples"] if sample["contestant"] == name]


def test_all_compute_the_same_loss_first(result):
    first = {name: row["first_loss"] for name, row in result["contestants"].items()}
    assert list(first) == CONTESTANTS
    for name in CONTESTANTS:
        # megatron-core's QK-norm is an RMSNorm without bias
        assert first[name] == pytest.approx(first["ours"], abs=2e-2 if name == "megatron" else 1e-5)


def test_optimizers_do_the_same(result):
    assert len(losses(result, "ours")) == 2
    assert losses(result, "plain") == pytest.approx(losses(result, "ours"), abs=1e-5)
    # Its QK-norm has an affine for each head, which move apart.
    for name in set(CONTESTANTS) & {"huggingface"}:
        assert losses(result, name) == pytest.approx(losses(result, "ours"), abs=1e-4)


def test_ratios_follow_from_samples(result):
    def seconds(name):
        return [sample["wall_seconds"] for sample in result["samples"] if sample["contestant"] == name]

    for name, row in result["contestants"].items():
        pairs = zip(seconds(name), seconds("ours"), strict=True)
        assert row["wall_ratio"]["median"] == pytest.approx(statistics.median(a / b for a, b in pairs))
        assert row["tokens_per_second"] == pytest.approx(64 / statistics.median(seconds(name)))


def test_says_what_it_was_measured_with(result):
    assert result["machine"]["versions"]["torch"]
    assert result["machine"]["cpu"]
    assert result["command"][1].endswith("train_step.py")
    assert result["shape"]["layers"] == 2
    assert result["documents"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contestants", "nobody"], "'nobody' is unknown in bf16; choose from ours, plain, plain-autocast"),
        (["--contestants", "plain-autocast", "--precision", "fp32"], "unknown in fp32"),
        (["--contestants", "ours", "ours"], "names one twice"),
        (["--heads", "7"], "--hidden 512"),
        (["--rounds", "0"], "--rounds: 0"),
    ],
)
def test_impossible_wishes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(make_parser().parse_args(arguments))
