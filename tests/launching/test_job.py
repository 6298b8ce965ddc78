"""The keeper of a job under stubs of SLURM's commands: what it does after each end. tests/slurm has the real one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megachameleon.launching.attempts import RUNNING, Attempt, read_attempts, write_attempts
from megachameleon.launching.node_check import NodeCheck

REPOSITORY = Path(__file__).parents[2]
STUBS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 exec "$@"
""",
    "scontrol": """
echo "scontrol $*" >>"$CALLS"
[[ "$1 $2" == "show job" ]] && echo "  JobState=$(cat state 2>/dev/null || echo RUNNING) TimeLimit=1-00:00:00" && exit
[[ $1 == show ]] && echo "$3" && exit
[[ $1 == requeue ]] && { echo "operation is presently disabled" >&2; exit 1; }
exit 0
""",
    "sbatch": 'echo "sbatch $*" >>"$CALLS"; echo 78',
    "squeue": 'if [[ $* == *PENDING* ]]; then echo "90|afterok:77(unfulfilled)"; else echo 1:00:00; fi',
    "notify": 'echo "notify $*" >>"$CALLS"',
}
TRAINER = """
import json, os, pathlib, sys
run = pathlib.Path(sys.argv[2].removeprefix("output_dir="))
def save(step):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
"""


@pytest.fixture
def keep(tmp_path):
    """A function that runs a job whose trainer is `program`; returns exit status, output and calls of SLURM."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tools").mkdir()
    (tmp_path / "run.yaml").write_text("model: {}\n")
    calls = tmp_path / "calls"

    def run(program, *options, nodes="here"):
        (tmp_path / "tools/train.py").write_text(TRAINER + program)
        calls.write_text("")
        variables = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": calls, "PYTHONPATH": REPOSITORY,
            "SLURM_JOB_ID": 77, "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NAME": "run", "SLURM_JOB_NUM_NODES": 1,
        }  # fmt: skip
        done = subprocess.run(
            [
                sys.executable, "-m", "megachameleon.launching.job", "--script", "train.sbatch",
                "--ranks-per-node", "1", "--alert-command", "notify", *options, "run.yaml",
                f"output_dir={tmp_path / 'run'}",
            ],
            cwd=tmp_path, env={key: str(value) for key, value in variables.items()}, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        heard = [line for line in calls.read_text().splitlines() if not line.startswith("scontrol show")]
        return done.returncode, done.stdout + done.stderr, heard

    run.folder = tmp_path / "run"
    return run


def test_a_finished_run_is_marked_and_not_run_again(keep):
    status, text, calls = keep("save(9)")
    assert status == 0 and calls == [] and "has finished" in text
    assert list(json.loads((keep.folder / "DONE").read_text()).values()) == [9]
    status, text, _ = keep("sys.exit(1)")
    assert status == 0 and "has finished already" in text
    assert len(read_attempts(keep.folder)) == 1


def test_a_run_that_got_further_goes_on_in_a_follow_up_that_inherits_what_waits(keep):
    status, text, calls = keep("save(9); raise RuntimeError('bad sample')")
    assert status == 1 and "failed first by rank 0" in text and "RuntimeError: bad sample" in text
    follow_up = (
        "sbatch --parsable --job-name=run --nodes=1 --time=1:00:00 --dependency=afterany:77 train.sbatch run.yaml "
        f"output_dir={keep.folder}"
    )
    assert calls == ["scontrol requeue 77", follow_up, "scontrol update JobId=90 Dependency=afterok:78"]


def test_a_run_that_gets_nowhere_alerts(keep):
    assert keep("sys.exit(1)", "--max-idle", "2")[2] != []
    status, text, calls = keep("sys.exit(1)", "--max-idle", "2")
    assert status == 1 and "2 attempts in a row without a new checkpoint" in text
    reason = text.split("not started again: ")[1].splitlines()[0]
    assert calls == [f"notify {keep.folder}: job 77 needs a person: {reason}"]
    status, _, calls = keep("sys.exit(2)", "--max-idle", "9")
    assert status == 2 and calls[0].startswith("notify ")


def test_a_job_that_is_cut_off_again_and_again_alerts_before_it_trains(keep):
    one = Attempt(submission="77", job="77.0", status=1, line=RUNNING, before=4, after=4, hosts=["x"], seconds=0)
    keep.folder.mkdir()
    write_attempts(keep.folder, [replace(one, line="died"), one])
    status, text, calls = keep("save(9)", "--max-idle", "2")
    assert status == 1 and calls[0].startswith("notify ") and "was cut off with its job" in text
    write_attempts(keep.folder, [replace(one, line="died", submission="5"), replace(one, submission="5")])
    assert keep("save(9)", "--max-idle", "2")[0] == 0  # a person has submitted it anew


def test_a_cancelled_job_does_not_come_back(keep):
    (keep.folder.parent / "state").write_text("COMPLETING RunTime=00:00:59")
    status, text, calls = keep("save(9); sys.exit(75)")
    assert status == 75 and calls == [] and "does not until it is submitted again" in text


def test_a_job_that_saved_only_after_its_limit_comes_back(keep):
    (keep.folder.parent / "state").write_text("COMPLETING RunTime=1-00:00:03")
    assert keep("save(9); sys.exit(75)")[2][0] == "scontrol requeue 77"


def test_a_run_stopped_by_its_file_rests(keep):
    status, text, calls = keep("save(9); print(\"stopped: the file 'stop' (maintenance)\"); sys.exit(75)")
    assert status == 75 and calls == [] and "submit it again to go on" in text


def test_a_folder_that_no_node_can_use_is_not_the_nodes_fault(keep, tmp_path):
    results, bad = keep.folder / "logs/77.0/preflight", tmp_path / "bad.txt"
    results.mkdir(parents=True)
    for host in ("a", "b"):
        NodeCheck(host=host, problems=[f"{keep.folder}: permission denied"]).write(results)
    options = ["--preflight", "--python", "true", "--exclude-file", str(bad)]
    status, text, calls = keep("save(9)", *options, nodes="a b")
    assert status == 2 and len(calls) == 1 and calls[0].startswith("notify ")
    assert f"--folders: {keep.folder}: permission denied, on all of 2 nodes" in text and not bad.exists()
    assert read_attempts(keep.folder)[-1].status == 2


def test_the_keeper_needs_no_package():
    """It runs beside a container, by whatever Python the host has."""
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import megachameleon.launching.job"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", program], check=False).returncode == 0
