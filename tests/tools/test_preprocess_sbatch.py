"""The batch script under a stub of Slurm: its array, its commands, and what is done when it is submitted again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megachameleon.data.plan import load_plan
from megachameleon.data.preprocessing.unit_state import unit_states
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples/slurm/preprocess.sbatch"
SBATCH = """#!/bin/bash
[[ $1 == --array=0-* ]] || exit 9
last=${1#--array=0-}; shift
for ((i = 0; i <= last; i++)); do
  SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_MAX=$last SLURM_CPUS_PER_TASK=1 bash "$@" || exit $?
done
"""
SRUN = """#!/bin/bash
echo "$*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def shell(tmp_path):
    """A function that runs a command with the stub of Slurm; returns exit status, output and what srun was given."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, content in (("sbatch", SBATCH), ("srun", SRUN)):
        (stubs / name).write_text(content)
        (stubs / name).chmod(0o755)
    log = tmp_path / "srun.log"

    def run(*command: object, **variables: object) -> tuple[int, str, list[str]]:
        log.write_text("")
        own = {"PATH": f"{stubs}:{os.environ['PATH']}", "LOG": log, "PYTHON": sys.executable, "PROJECT": REPOSITORY}
        environment = {**os.environ, **{k: str(v) for k, v in {**own, **variables}.items()}}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


def test_an_array_of_any_size_makes_what_is_not_finished(tmp_path, shell):
    raw, tokenizer, output = tmp_path / "raw", tmp_path / "tokenizer", tmp_path / "shards"
    raw.mkdir()
    for number in range(5):
        (raw / f"{number}.txt").write_text(f"text number {number}")
    vocabulary = Vocabulary.compact(num_text_ids=300, num_image_codes=8, image_grid=(2, 2))
    train_text_tokenizer([f"red green blue {number} squares" for number in range(50)], vocabulary, tokenizer)
    settings = {"OUTPUT": output, "CACHE": tmp_path / "cache"}
    status, text, _ = shell("bash", SCRIPT, "plan", INPUT=raw, TOKENIZER=tokenizer, FLAGS="--seed 3", **settings)
    assert status == 0 and "5 units from 5 inputs" in text
    assert load_plan(output).options.seed == 3
    status, text, _ = shell("bash", SCRIPT, "verify", **settings)
    assert status == 1 and "0 of 5 units are finished, 5 missing" in text and "submit the array again" in text
    status, text, given = shell("sbatch", "--array=0-1", SCRIPT, **settings)
    assert status == 0, text
    assert [line.split("--task ")[1].split(" --workers")[0] for line in given] == ["0 --num-tasks 2", "1 --num-tasks 2"]
    before = {path.name: path.read_bytes() for path in output.glob("0*")}
    assert len(before) == 20
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    (output / "00003-3.json").unlink()
    status, text, given = shell("sbatch", "--array=0-2", SCRIPT, **settings)
    assert status == 0 and len(given) == 3
    assert {path.name: path.read_bytes() for path in output.glob("0*")} == before
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["00003-3.json"]
    status, text, _ = shell("bash", SCRIPT, "verify", **settings)
    assert status == 0 and "all shards are what their manifests say" in text
    assert shell("bash", SCRIPT, "nonsense", **settings)[0] == 2
    assert [state.state for state in unit_states(load_plan(output))] == ["finished"] * 5


def test_what_is_not_said_is_asked_for(shell):
    status, text, _ = shell("bash", SCRIPT)
    assert status == 1 and "set OUTPUT to the folder of plan and shards" in text
