"""The comparison of ways to prepare pictures, tiny, through its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contestants import pictures
from benchmarks.photographs import make_jpegs
from benchmarks.picture_preparation import AllPictures, build, measure_distances

PROJECT = Path(__file__).parents[2]
TINY = "--pictures 2 --width 80 --height 60 --size 32 --rounds 2 --warmup 0"


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.picture_preparation", *TINY.split(), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


def test_ratios_follow_from_samples_and_pillow_is_no_distance_from_itself(tmp_path):
    for number, data in enumerate(make_jpegs(2, 60, 80, seed=1)):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    done = benchmark("--folder", tmp_path, "--output", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["ours", "ours-exact", "pillow"]
    assert rows["pillow"]["largest_difference"] == rows["ours-exact"]["largest_difference"] == 0
    assert rows["ours"]["largest_difference"] <= 2

    def seconds(name):
        return [sample["cpu_seconds"] for sample in result["samples"] if sample["contestant"] == name]

    pairs = zip(seconds("pillow"), seconds("ours"), strict=True)
    assert rows["pillow"]["ratio"]["most"] == pytest.approx(max(theirs / ours for theirs, ours in pairs))
    assert rows["pillow"]["pictures_per_second"] == pytest.approx(2 / np.median(seconds("pillow")))


def test_distance_is_the_mean_and_the_most_over_pictures():
    jpegs = make_jpegs(2, 40, 40, seed=0)
    shifted = AllPictures(lambda data, size: pictures.pillow(data, size).astype(int) + 3, jpegs, 16)
    shifted_once = AllPictures(
        lambda data, size: pictures.pillow(data, size).astype(int) - 7 * (data == jpegs[0]), jpegs, 16
    )
    found = measure_distances({"both": shifted, "first": shifted_once}, jpegs, 16)
    assert found == {"both": (3.0, 3), "first": (3.5, 7)}


def test_drawn_pictures_depend_on_their_seed_only():
    first, second = make_jpegs(2, 64, 48, seed=3)
    assert [first, second] == make_jpegs(2, 64, 48, seed=3)
    assert first != second and first not in make_jpegs(1, 64, 48, seed=4)


def test_what_cannot_be_measured_is_said(tmp_path, monkeypatch):
    done = benchmark("--folder", tmp_path)
    assert done.returncode == 2 and "holds no .jpg" in done.stderr
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="opencv-area needs a package"):
        build(["opencv-area"], [b""], 16)
