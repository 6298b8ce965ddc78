"""Hostile and damaged checkpoints through the command, as a user runs it: one line, no traceback, nothing written."""

import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_cases import HF, MEGATRON, META, marker, rewritten
from hostile_files import Runs
from three_formats import Case, heads, write

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
TINY = Case(
    ["model.vocab_size=128", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=2",
     *heads(8, 4, 4, "swin")]
)  # fmt: skip
TABLE = [
    *(pytest.param("meta", *row, id=f"meta: {name}") for name, row in META.items()),
    *(pytest.param("hf", *row, id=f"hf: {name}") for name, row in HF.items()),
    *(pytest.param("megatron", *row, id=f"megatron: {name}") for name, row in MEGATRON.items()),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of each format."""
    folder = tmp_path_factory.mktemp("sound")
    return {kind: write(kind, folder / kind, TINY) for kind in ("meta", "hf", "megatron")}


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the command in this process: its exit status and what it says on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
            raise SystemExit(0)
        return ended.value.code, capsys.readouterr().err

    return run


def everything_below(folder):
    return {path for path in folder.rglob("*") if not any(part.endswith(".converting") for part in path.parts)}


@pytest.mark.parametrize(("kind", "spoil", "said"), TABLE)
def test_it_is_refused(sound, convert, kind, spoil, said, tmp_path):
    source = shutil.copytree(sound[kind], tmp_path / "some" / "source")
    spoil(source)
    before = everything_below(tmp_path)
    target = "hf" if kind == "megatron" else "megatron"
    status, error = convert("--from", kind, "--to", target, source, tmp_path / "dst")
    assert status == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(words in error for words in said), error
    assert everything_below(tmp_path) == before  # no destination, and nothing was executed


@pytest.mark.parametrize("kind", ["meta", "hf", "megatron"])
def test_what_is_sound_is_not(sound, convert, kind, tmp_path):
    """Also a file written by hand, from which lies are made above."""
    source = shutil.copytree(sound[kind], tmp_path / "source")
    if kind == "meta":
        rewritten(source)
    status, error = convert("--from", kind, "--to", "megatron", source, tmp_path / "dst")
    assert (status, error) == (0, "") and (tmp_path / "dst").is_dir()


def test_a_process_of_its_own_says_no_more(sound, tmp_path):
    source = shutil.copytree(sound["meta"], tmp_path / "source")
    META["a pickle in a zip"][0](source)
    done = subprocess.run(
        [sys.executable, TOOL, "--from", "meta", "--to", "hf", source, tmp_path / "dst"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "dst").exists() and not marker(source).exists()


def test_the_hostile_object_does_run_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "was_run")))
    assert (tmp_path / "was_run").exists()
