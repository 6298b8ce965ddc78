"""The comparison of picture encoders, tiny, through its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.vq_encode import NAMES, compare_codes

PROJECT = Path(__file__).parents[2]
TINY = "--device cpu --threads 1 --size 32 --channels 32 --rounds 2 --warmup 0"


def test_all_encoders_give_the_same_codes_and_ratios_follow_from_samples(tmp_path):
    command = [sys.executable, "-m", "benchmarks.vq_encode", *TINY.split(), "--contestants", *NAMES]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "found.json")],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(NAMES)
    for name in ("ours", "ours-plain", "huggingface", "huggingface-channels-last"):
        assert rows[name]["equal_codes"] == 1

    def seconds(name):
        return [sample["cpu_seconds"] for sample in result["samples"] if sample["contestant"] == name]

    pairs = zip(seconds("huggingface"), seconds("ours"), strict=True)
    assert rows["huggingface"]["ratio"]["most"] == pytest.approx(max(theirs / ours for theirs, ours in pairs))


def test_an_encoder_with_other_codes_is_not_compared():
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def zeros(batch):
        return torch.zeros(len(batch), 4, dtype=torch.int64)

    def one_off(batch):
        return torch.tensor([[0, 0, 0, 1]]).expand(len(batch), 4)

    assert compare_codes({"ours": zeros, "ours-bf16": one_off}, zeros, pictures) == {"ours": 1.0, "ours-bf16": 0.75}
    with pytest.raises(ValueError, match=r"ours gives the codes of 75\.00% of patches only"):
        compare_codes({"ours": one_off}, zeros, pictures)
