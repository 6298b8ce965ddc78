"""The command, killed in the middle of some 50 MB: run again it goes on, and writes what it would have written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from three_formats import Case, heads, write

ROOT = Path(__file__).parents[3]
LARGE = Case(
    ["model.vocab_size=128", "model.hidden_size=512", "model.ffn_hidden_size=1408", "model.num_layers=4",
     *heads(16, 8, 8, "swin")]
)  # fmt: skip
EXPORTS = {"meta": ["--workers", "1"], "hf": ["--workers", "2", "--shard-size", "0.006"]}
PATIENCE = 200
"""Seconds for a process that may have to wait for a busy machine."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write("megatron", tmp_path_factory.mktemp("large") / "ours", LARGE)


def start(source, kind, target):
    command = [sys.executable, "tools/convert_checkpoint.py", "--from", "megatron", "--to", kind, source, target]
    return subprocess.Popen(
        [*map(str, command), *EXPORTS[kind]],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    said, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    return said


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_in_the_middle(process, target):
    """Whether it was killed with files done and another begun; it may have been faster than we look.

    A worker records its file before it begins another, so of three files of two workers one is recorded.
    """
    folder = target.with_name(f".{target.name}.converting")
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        done = [path for path in folder.glob("*") if path.suffix in (".pth", ".safetensors")]
        begun = [path for path in folder.glob("*.partial") if size_of(path)]
        if len(done) >= 3 and begun:
            process.kill()
            process.communicate()
            return process.returncode == -signal.SIGKILL and folder.exists()
        time.sleep(0.0005)
    process.communicate(timeout=PATIENCE)
    return False


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has got its own name by now
        return 0


@pytest.mark.parametrize("kind", ["meta", pytest.param("hf", marks=pytest.mark.slow)])
def test_it_goes_on(source, kind, tmp_path):
    for attempt in range(5):
        target = tmp_path / f"killed{attempt}"
        if kill_in_the_middle(start(source, kind, target), target):
            break
    else:
        pytest.fail("was done before it could be killed, five times")
    assert not target.exists()
    said = finish(start(source, kind, target))
    assert "from an interrupted conversion" in said
    finish(start(source, kind, tmp_path / "whole"))
    killed, whole = contents(target), contents(tmp_path / "whole")
    assert killed.keys() == whole.keys() and sum(map(len, whole.values())) > 45_000_000
    assert [name for name in whole if killed[name] != whole[name]] == []
    assert not list(tmp_path.glob(f".{target.name}*"))
