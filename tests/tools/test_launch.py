"""Submitting to SLURM, with a stub of sbatch: the script that is shown is the one that is sent, and it is checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megachameleon.launching.submission import Request

REPOSITORY = Path(__file__).parents[2]
SBATCH = """#!/bin/bash
n=$(($(cat "$LOG.count" 2>/dev/null || echo 100) + 1)); echo $n >"$LOG.count"
[[ $n == "$REFUSED" ]] && { echo "no such partition" >&2; exit 1; }
echo "$*" >>"$LOG"
echo $n
"""


@pytest.fixture
def launch(tmp_path):
    """A function that runs tools/launch.py; returns exit status, output, and what sbatch was given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "bin/scancel").write_text('#!/bin/bash\necho "scancel $*" >>"$LOG"\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    log = tmp_path / "log"

    def run(*words, **variables):
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LOG": str(log), **variables}
        done = subprocess.run(
            [sys.executable, "tools/launch.py", "debug", f"output_dir={tmp_path / 'run'}", *map(str, words)],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []

    return run


def test_what_is_shown_is_what_is_submitted(launch, tmp_path):
    words = [
        "--nodes",
        2,
        "--gpus-per-node",
        2,
        "--time",
        "1:00:00",
        "--partition",
        "gpu",
        "--sbatch=--constraint=h100",
    ]
    status, shown, sent = launch(*words, "--print")
    assert status == 0 and sent == [] and not (tmp_path / "run").exists()
    lines = shown.splitlines()
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=2", "#SBATCH --time=1:00:00", "#SBATCH --partition=gpu",
        "#SBATCH --constraint=h100", "#SBATCH --job-name=debug", "#SBATCH --exclusive", "export RANKS_PER_NODE=2",
        f"set -- debug output_dir={tmp_path / 'run'}",
    ):  # fmt: skip
        assert lines.count(line) == 1, line
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[: max(directives)])  # SLURM reads none after a command
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=False).returncode == 0
    status, text, sent = launch(*words)
    script = tmp_path / "run" / "debug.sbatch"
    assert status == 0 and text == f"job 101: {script}\n" and sent == [f"--parsable {script}"]
    assert script.read_text() == shown


def test_a_layout_that_does_not_fit_is_not_submitted(launch):
    status, text, sent = launch("--nodes", 2, "--gpus-per-node", 3)
    assert (status, sent) == (2, []) and text.count("\n") == 1
    assert text.startswith("error: debug on 2 nodes x 3 = 6 ranks: training.global_batch_size: 8 is not divisible")
    status, text, _ = launch("--gpus-per-node", 2, "--container", "image")
    assert status == 2 and "--container: image must be a path" in text
    status, text, _ = launch("--gpus-per-node", 2, "--mounts", "/a:/a, /b:/b")
    assert status == 2 and "--mounts: '/a:/a, /b:/b' has a space" in text
    status, text, _ = launch("--gpus-per-node", 0)
    assert status == 2 and "--ranks-per-node" in text
    status, text, _ = launch("--gpus-per-node", 3)
    assert status == 2 and text.startswith("error: debug on 1 node x 3 = 3 ranks: ")


def test_without_slurm_nothing_is_left_behind(launch, tmp_path):
    for words in ([], ["--test-only"]):
        status, text, _ = launch("--gpus-per-node", 2, *words, PATH=str(tmp_path))
        assert status == 2 and text.count("\n") == 1 and not (tmp_path / "run").exists()
        assert text.startswith("error: sbatch: SLURM's command was not found on this machine; submit from a login node")
    assert launch("--gpus-per-node", 2, "--print", PATH=str(tmp_path))[0] == 0


def test_times_are_slurms_and_a_site_is_a_file():
    for time in ("90", "90:30", "24:00:00", "2-12", "2-12:30", "2-12:30:00", "unlimited", ""):
        Request(time=time).validate()
    for time in ("bla", "24h", "1:2:3:4", "-5", "1-"):
        with pytest.raises(ValueError, match=f"^--time: '{time}' is no limit that SLURM knows"):
            Request(time=time).validate()
    Request(site=__file__).validate()
    with pytest.raises(ValueError, match=r"^--site: nowhere\.env: no such file"):
        Request(site="nowhere.env").validate()


def test_nodes_without_gpus_are_not_asked_for_gpus(launch):
    status, shown, _ = launch("--gpus-per-node", 0, "--ranks-per-node", 2, "--print")
    assert status == 0 and "#SBATCH --gpus-per-node" not in shown and "export RANKS_PER_NODE=2" in shown


def test_excluded_nodes_and_a_container_reach_the_script(launch, tmp_path):
    (tmp_path / "bad.txt").write_text("node7  # hot\nnode9\n")
    flags = ["--exclude-file", tmp_path / "bad.txt", "--container", "/images/mc.sqsh", "--mounts", "/data:/data"]
    status, shown, _ = launch("--gpus-per-node", 2, *flags, "--preflight", "--print")
    assert status == 0 and "#SBATCH --exclude=node7,node9" in shown
    assert "export CONTAINER=/images/mc.sqsh" in shown and "export PREFLIGHT=1" in shown


def test_a_chain_waits_stage_after_stage_with_one_alarm(launch, tmp_path):
    other = tmp_path / "second.yaml"
    other.write_text((REPOSITORY / "megachameleon/config/presets/debug.yaml").read_text())
    status, text, sent = launch(other, "--gpus-per-node", 2, "--convert-to", "/out", "--account", "me", "--after", 7)
    assert status == 0 and [line.split(": ")[1] for line in text.splitlines()] == [
        "debug",
        "second",
        "convert",
        "alert",
    ]
    run = tmp_path / "run"
    wait = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert sent == [
        f"--parsable {wait.format(7)} {run}/debug.sbatch",
        f"--parsable {wait.format(101)} {run}/second.sbatch",
        f"--parsable --account=me {wait.format(102)} examples/slurm/convert.sbatch {run} /out",
        "--parsable --dependency=afternotok:101?afternotok:102?afternotok:103 --kill-on-invalid-dep=yes --account=me "
        "examples/slurm/alert.sbatch debug=101 second=102 convert=103",
    ]


def test_a_chain_is_submitted_whole_or_not_at_all(launch):
    status, text, sent = launch("--gpus-per-node", 2, "--convert-to", "/out", REFUSED="102")
    assert status == 1 and "no such partition" in text and sent[-1] == "scancel 101"


def test_the_chain_script_hands_its_stages_over(tmp_path):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$@"\n')
    show.chmod(0o755)
    variables = {"PYTHON": str(show), "STAGE1": "a.yaml", "EXPORT": "/out", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", REPOSITORY / "examples/slurm/chain.sh", "--nodes", "4"], env=variables, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "tools/launch.py a.yaml stage2.yaml fine_tuning.yaml --convert-to /out --nodes 4\n"
