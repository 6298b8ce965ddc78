"""Training on a real SLURM: over two nodes, pre-empted, out of time, with a dead node, a dead rank; arrays and chains.

Every disturbed run must end bit-equal to calm ones. Wanted with `make test-slurm`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from cluster import trackers
from cluster_commands import Slurm

from megachameleon.launching.attempts import newest_step, read_attempts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 240


def hashes(run):
    """SHA-256 of every file of tensors in the last checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    assert len(files) == 2
    return files


def processes(job, **variables):
    """Ids of the job's processes that have these variables."""
    wanted = {f"SLURM_JOB_ID={job}", *(f"{key}={value}" for key, value in variables.items())}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted <= set(path.read_bytes().decode(errors="replace").split("\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def calm(run_yaml, job_folder, make_cluster):
    """Hashes of undisturbed runs: two at the same time on the same two nodes, which must not meet each other."""
    slurm = Slurm(make_cluster(trackers()[0]), job_folder)
    runs = [job_folder / "calm", job_folder / "twin"]
    shared = ["--sbatch=--exclusive=user", "--sbatch=--nodelist=node1,node2"]
    jobs = [slurm.launch(run_yaml, f"output_dir={run}", *shared) for run in runs]
    for job, run in zip(jobs, runs, strict=True):
        slurm.until_step(run, 1, job)
    assert [slurm.field(job, "JobState") for job in jobs] == ["RUNNING"] * 2
    for job in jobs:
        slurm.until_state(job, "COMPLETED", "FAILED", "PENDING")
        assert slurm.field(job, "JobState") == "COMPLETED", slurm.log(job)
    assert hashes(runs[0]) == hashes(runs[1])
    ports = {log.split("meeting at port ")[1].split(":")[0] for log in map(slurm.log, jobs)}
    assert len(ports) == 2
    return hashes(runs[0])


def test_two_nodes_train_together_and_keep_a_log_for_each_rank(calm, slurm, job_folder):
    run = job_folder / "calm"
    (attempt,) = read_attempts(run)
    assert (attempt.status, attempt.before, attempt.after, attempt.hosts) == (0, -1, STEPS, ["node1", "node2"])
    logs = run / "logs" / attempt.job
    assert sorted(path.name for path in logs.glob("rank-*")) == ["rank-00000.log", "rank-00001.log"]
    assert "2 processes" in (logs / "rank-00000.log").read_text()
    assert json.loads((logs / "node-0001.json").read_text())["host"] == "node2"


def finish(slurm, job, run, calm):
    """The job must end by itself now, with what an undisturbed run ends with."""
    slurm.until_state(job, "COMPLETED", "FAILED")
    assert slurm.field(job, "JobState") == "COMPLETED", slurm.log(job)
    assert hashes(run) == calm
    return read_attempts(run)


def test_a_pre_empted_run_saves_comes_back_and_ends_bit_equal(calm, any_slurm, run_yaml, tmp_path):
    slurm, run = any_slurm, tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}", "--partition", "preemptible")
    slurm.until_step(run, 10, job)
    other = slurm.call("sbatch", "--parsable", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 3")
    slurm.let_again(job)
    slurm.until_state(other, "COMPLETED")
    first, second = finish(slurm, job, run, calm)
    assert first.status == 75 and first.line.startswith("was stopped by SIGUSR1") and 10 <= first.after < STEPS
    assert (second.before, second.status) == (first.after, 0)  # not a step was lost


def test_a_run_out_of_time_saves_and_comes_back(calm, slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}")
    slurm.until_step(run, 10, job)
    slurm.call("scontrol", "update", f"JobId={job}", "EndTime=now+60seconds")  # SLURM looks at limits every 30 s
    if not (run / "DONE").exists():
        slurm.let_again(job)
    first, second = finish(slurm, job, run, calm)
    assert first.status == 75 and second.before == first.after


def test_a_dead_node_costs_the_steps_since_the_last_checkpoint_only(calm, slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}")
    slurm.until_step(run, 45, job)
    dead = slurm.call("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()[1]
    slurm.cluster.kill_node(dead)
    try:
        slurm.let_again(job)
        first, second = finish(slurm, job, run, calm)
    finally:
        slurm.cluster.start_node(dead)
        slurm.cluster.wait_idle()
    assert first.after >= 40 and second.before == first.after and dead not in second.hosts
    assert "was cut off with its job" in first.line or dead in first.line


def test_a_killed_rank_is_named_and_a_follow_up_goes_on_where_requeueing_is_disabled(calm, slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}", "--sbatch=--no-requeue")
    waiting = slurm.call(
        "sbatch", "--parsable", f"-dafterok:{job}", "--kill-on-invalid-dep=yes", "-o/dev/null", "--wrap", "true"
    )
    slurm.until_step(run, 45, job)
    (rank,) = [pid for pid in processes(job, RANK=1) if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(rank, signal.SIGKILL)
    slurm.until_state(job, "FAILED")
    assert slurm.field(job, "ExitCode") == "137:0"
    (attempt, *_) = read_attempts(run)
    assert attempt.line.startswith("failed first by rank 1 on node") and "killed by SIGKILL" in attempt.line
    assert processes(job) == []  # nobody is left
    log = slurm.log(job)
    follow_up = log.split("job: job ")[-1].split()[0]
    assert (
        f"afterok:{follow_up}" in slurm.field(waiting, "Dependency") or slurm.field(waiting, "JobState") == "COMPLETED"
    )
    _, second = finish(slurm, follow_up, run, calm)
    assert second.before >= 40 and second.submission == job
    slurm.until_state(waiting, "COMPLETED")


def test_a_stop_file_ends_the_job_for_good(slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}", nodes=1)
    slurm.until_step(run, 10, job)
    (run / "stop").write_text("maintenance")
    slurm.until_state(job, "FAILED")
    assert slurm.field(job, "ExitCode") == "75:0"
    (attempt,) = read_attempts(run)
    assert "the file 'stop'" in attempt.line and attempt.after >= 10
    assert "submit it again to go on" in slurm.log(job)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    job = slurm.launch(run_yaml, f"output_dir={run}", nodes=1)
    slurm.until_step(run, 10, job)
    slurm.call("scancel", job)
    slurm.until(lambda: processes(job) == [], "all its processes are gone", job=job)
    slurm.until_state(job, "CANCELLED", "PENDING")
    assert slurm.field(job, "JobState") == "CANCELLED" and slurm.call("squeue", "--noheader") == ""
    assert newest_step(run) >= 10  # KillWait was long enough


def test_a_chain_runs_stage_after_stage_and_skips_what_is_done(slurm, run_yaml, tmp_path):
    run = tmp_path / "run"
    stages = []
    for name, steps in (("one", 4), ("two", 8)):
        stages.append(tmp_path / f"{name}.yaml")
        stages[-1].write_text(run_yaml.read_text().replace("num_steps: 240", f"num_steps: {steps}"))
    chain = [stages[0], stages[1], f"output_dir={run}", "--convert-to", tmp_path / "converted"]
    ids = slurm.launch(*chain, nodes=1).split()
    for job in ids[:3]:
        slurm.until_state(job, "COMPLETED", "FAILED", "CANCELLED")
        assert slurm.field(job, "JobState") == "COMPLETED", slurm.log(job)
    slurm.until_state(ids[3], "CANCELLED")  # the alarm
    assert [attempt.after for attempt in read_attempts(run)] == [4, 8]
    again = slurm.launch(*chain, nodes=1).split()
    slurm.until_state(again[1], "COMPLETED")
    assert "has finished already" in slurm.log(again[0]) and "has finished already" in slurm.log(again[1])


def test_a_failed_stage_cancels_the_next_and_raises_the_alarm(slurm, run_yaml, tmp_path):
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text(run_yaml.read_text().replace("/pairs", "/no_such_shards"))
    good.write_text(run_yaml.read_text())
    told = tmp_path / "told"
    site = tmp_path / "site.env"
    (tmp_path / "notify").write_text(f'#!/bin/sh\necho "$1" >>{told}\n')
    (tmp_path / "notify").chmod(0o755)
    site.write_text(f"ALERT_COMMAND={tmp_path}/notify\n. examples/slurm/site.env\n")
    first, second, alarm = slurm.launch(
        bad, good, f"output_dir={tmp_path / 'run'}", "--site", site, nodes=1, SITE_ENV=site
    ).split()
    slurm.until_state(first, "FAILED")
    assert slurm.field(first, "ExitCode") == "2:0"  # bad input: not tried again
    slurm.until_state(second, "CANCELLED")
    slurm.until_state(alarm, "COMPLETED")
    words = told.read_text()
    assert "needs a person: the input is at fault" in words and "no_such_shards" in words
    assert f"a chain stopped at bad (job {first}, FAILED)" in words


def test_an_array_makes_shards(slurm, tmp_path):
    from megachameleon.tokens.text.training import train_text_tokenizer
    from megachameleon.tokens.vocabulary import Vocabulary

    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(5):
        (raw / f"{number}.txt").write_text(f"text number {number}")
    vocabulary = Vocabulary.compact(num_text_ids=300, num_image_codes=8, image_grid=(2, 2))
    train_text_tokenizer(
        [f"red green blue {number} squares" for number in range(50)], vocabulary, tmp_path / "tokenizer"
    )
    settings = {
        "OUTPUT": tmp_path / "shards",
        "CACHE": tmp_path / "cache",
        "INPUT": raw,
        "TOKENIZER": tmp_path / "tokenizer",
    }
    script = "examples/slurm/preprocess.sbatch"
    slurm.call("bash", script, "plan", **settings)
    small = ["--parsable", "--cpus-per-task=1", "--mem=1G", "--gres=none", f"--output={slurm.folder}/%j.log"]
    array = slurm.call("sbatch", "--array=0-1", *small, script, **settings)
    verify = slurm.call(
        "sbatch", "--array=0", f"-dafterok:{array}", "--kill-on-invalid-dep=yes", *small, script, "verify", **settings
    )
    slurm.until_state(verify, "COMPLETED", "FAILED", "CANCELLED")
    assert "all shards are what their manifests say" in slurm.log(slurm.field(verify, "JobId"))
    assert len(list((tmp_path / "shards").glob("0*.json"))) == 5


def test_a_job_leaves_a_bad_node_before_it_trains(slurm, run_yaml, tmp_path):
    """A stand-in for nvidia-smi says that the node that asks first has ECC errors."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        f"#!/bin/sh\nmkdir {tmp_path}/asked 2>/dev/null && hostname >{tmp_path}/first\n"
        f'ecc=0; [ "$(hostname)" = "$(cat {tmp_path}/first)" ] && ecc=3\n'
        'case "$1" in *index*) echo "0, NVIDIA H100 80GB HBM3, 34, 4, 81559, 1980, $ecc" ;; *) echo "[N/A]" ;; esac\n'
    )
    (tools / "nvidia-smi").chmod(0o755)
    run, bad = tmp_path / "run", tmp_path / "bad_nodes.txt"
    path = f"{tools}:{slurm.cluster.environment()['PATH']}"
    # emulated nodes share this machine's cores and disk, so their bandwidths are no measure of them
    easy = "--storage-mb 1 --message-mb 0.1 --of-median 0"
    job = slurm.launch(
        run_yaml, f"output_dir={run}", "training.num_steps=3", "training.global_batch_size=6", "--preflight",
        "--exclude-file", bad, nodes=3, PATH=path, PREFLIGHT_FLAGS=easy,
    )  # fmt: skip
    slurm.until_state(job, "FAILED")
    name = (tmp_path / "first").read_text().strip()
    assert bad.read_text().startswith(f"{name}  # ") and "3 uncorrected ECC errors" in bad.read_text()
    follow_up = slurm.log(job).split("job: job ")[-1].split()[0]
    slurm.until_state(follow_up, "COMPLETED", "FAILED")
    attempts = read_attempts(run)
    assert attempts[0].line == f"refused {name}" and attempts[-1].status == 0 and name not in attempts[-1].hosts


def test_slurm_is_asked_without_queueing(slurm, run_yaml, tmp_path):
    words = [
        sys.executable,
        "tools/launch.py",
        run_yaml,
        f"output_dir={tmp_path}",
        "--gpus-per-node",
        "1",
        "--time",
        "10",
    ]
    assert "to start at" in slurm.call(*words, "--nodes", "2", "--test-only")
    with pytest.raises(AssertionError, match="sbatch --test-only"):
        slurm.call(*words, "--nodes", "4", "--test-only", "--sbatch=--partition=nowhere")
    assert slurm.call("squeue", "--noheader", "--name=run") == ""
