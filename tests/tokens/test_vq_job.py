import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megachameleon.tokens.vq import ImageTokenizer, running
from megachameleon.tokens.vq.job import Job
from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.patch_training import PatchTrainer, PatchTraining
from megachameleon.tokens.vq.running import run_job
from megachameleon.tokens.vq.source import PictureInput

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = PatchConfig(
    image_size=16, grid=4, code_dim=8, fine_channels=8, coarse_channels=8, encoder_blocks=1, decoder_blocks=1
)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(chance.integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize((16, 16)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"oops")
    return folder


@pytest.fixture
def small(pictures, tmp_path):
    training = PatchTraining(steps=12, batch_size=8, num_codes=16, continuous_part=0.3)
    return Job(
        inputs=(PictureInput(pictures),),
        output=tmp_path / "out",
        shape=SHAPE,
        training=training,
        held_out=4,
        checkpoint_every=4,
        log_every=2,
    )


def run(job_, **kwargs):
    lines = []
    run_job(job_, CPU, say=lines.append, **kwargs)
    return "\n".join(lines)


def test_a_job_leaves_a_tokenizer_and_its_report(small):
    assert "1 set aside" in run(small)
    report = json.loads((small.output / "report.json").read_text())
    assert report["num_held_out"] == 4 and report["num_train"] == 36 and report["num_quarantined"] == 1
    assert report["psnr_held_out"] > 3 and 0 < report["codes_in_use"] <= 16 and 1 <= report["perplexity"] <= 16
    metrics = [json.loads(line) for line in (small.output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [2, 4, 6, 8, 10, 12] and {"loss", "psnr", "l1"} <= set(metrics[0])
    assert "not a picture" in json.loads((small.output / "quarantine.jsonl").read_text())["reason"]
    assert Image.open(small.output / "reconstructions.png").size == (4 * 20, 2 * 20)
    assert not (small.output / "checkpoint.safetensors").exists()
    tokenizer = ImageTokenizer.load(small.output)
    assert tokenizer.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 16)


def test_an_interrupted_job_ends_bit_equal(small, tmp_path, monkeypatch):
    whole = replace(small, output=tmp_path / "whole")
    run(whole)
    step = PatchTrainer.step

    def interrupted(self, number, pictures):
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number, pictures)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PatchTrainer, "step", interrupted)
        run(small)
    assert not (small.output / "image_tokenizer.json").exists()
    assert "going on from step 4 of 12" in run(small)
    name = "image_tokenizer.safetensors"
    assert (small.output / name).read_bytes() == (whole.output / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (small.output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    one, two = ImageTokenizer.load(small.output), ImageTokenizer.load(whole.output)
    assert one.fingerprint == two.fingerprint


def test_a_complete_job_is_not_done_again(small):
    run(small)
    before = (small.output / "image_tokenizer.json").stat().st_mtime_ns
    assert "complete already" in run(small)
    assert (small.output / "image_tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="num_codes was 16 and is 32"):
        run(replace(small, training=replace(small.training, num_codes=32)))


def test_a_checkpoint_of_other_flags_or_pictures_is_refused(small, pictures, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running._Run, "_finish", interrupted)
        run(small)
    assert "optimizer.momentum.encoder.1.weight" in load_file(small.output / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="held_out was 4 and is 3"):
        run(replace(small, held_out=3))
    Image.new("RGB", (16, 16), "red").save(pictures / "new.png")
    with pytest.raises(ValueError, match="other pictures"):
        run(small)
    (small.output / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        run(small)


@pytest.mark.parametrize(
    "values", [{"checkpoint_every": 0}, {"evaluate_every": -1}, {"held_out": 0}, {"max_pictures": 0}]
)
def test_impossible_jobs_are_refused(small, values):
    name, value = next(iter(values.items()))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value} must be at least"):
        replace(small, **values)


def test_processes_that_start_apart_are_refused(small, monkeypatch):
    monkeypatch.setattr(running, "of_all_processes", lambda start: [start, ("other", 0)])
    with pytest.raises(ValueError, match="process 1 finds other pictures or another checkpoint"):
        run(small)


def test_too_little_disk_is_refused(small, monkeypatch):
    monkeypatch.setattr(running, "OTHER_BYTES", 10**18)
    with pytest.raises(ValueError, match="training an image tokenizer needs"):
        run(small)


def tool(launcher, *flags):
    command = [*launcher, str(ROOT / "tools" / "train_image_tokenizer.py"), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_the_tool_under_torchrun_and_its_errors(pictures, tmp_path):
    flags = ["--input", pictures, "--output", tmp_path / "out", "--image-size", 16, "--grid", 4, "--num-codes", 16]
    flags += ["--steps", 6, "--batch-size", 8]
    done = tool([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["processes"] == 2
    assert ImageTokenizer.load(tmp_path / "out").grid == (4, 4)
    refused = tool([sys.executable], *flags[:-1], 16)
    assert refused.returncode == 2 and "batch_size was 8 and is 16" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
