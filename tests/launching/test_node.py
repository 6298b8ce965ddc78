"""The launcher of a node, with short programs as ranks: statuses, signals, logs, the first failure, no zombie."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megachameleon.launching.failures import Failure, failure_line, first_failure
from megachameleon.launching.node import Heartbeat, Place, launch_or_tell, parse
from megachameleon.launching.records import outcome, read_record

REPOSITORY = Path(__file__).parents[2]
SAVES = """
import os, signal, sys, time
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
print("ready", os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], flush=True)
while not got: time.sleep(0.02)
time.sleep(0.3)
print("stopped: the file 'stop'")
sys.exit(75 if len(got) == 1 else 9)
"""
"""Ends with 75 when asked once, with 9 when asked twice."""
FAILS = """
import os, time
if os.environ["RANK"] == "2":
    time.sleep(0.3)
    raise RuntimeError("bad sample 17")
if os.environ["RANK"] == "1":
    time.sleep(0.8)
    raise RuntimeError("Connection reset by peer")
time.sleep(600)
"""


def command(tmp_path, program, *options, ranks=3):
    (tmp_path / "program.py").write_text(program)
    return [
        sys.executable, "-m", "megachameleon.launching.node", "--ranks-per-node", str(ranks),
        "--logs", str(tmp_path / "logs"), *options, str(tmp_path / "program.py"),
    ]  # fmt: skip


@pytest.fixture
def launch(tmp_path):
    """Start the launcher; what the test leaves running is killed."""
    started = []

    def start(program, *options, **keywords):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        started.append(
            subprocess.Popen(
                command(tmp_path, program, *options, **keywords),
                env={**environment, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition, seconds=30.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.02)


def text_of(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_delivered_twice_reaches_the_ranks_once_and_75_comes_back(launch, tmp_path, number):
    process = launch(SAVES)
    until(lambda: all("ready" in text_of(tmp_path / "logs" / f"rank-{rank:05d}.log") for rank in range(3)))
    process.send_signal(number)
    time.sleep(0.15)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert out == "ready 0 0 3\nstopped: the file 'stop'\n"  # rank 0 alone is shown
    assert text_of(tmp_path / "logs" / "rank-00002.log").startswith("ready 2 2 3\n")
    assert read_record(tmp_path / "logs" / "node-0000.json").statuses == {0: 75, 1: 75, 2: 75}
    assert outcome(tmp_path / "logs", ["here"]).line == "was stopped by the file 'stop'"


def test_a_failed_rank_ends_the_others_and_is_named(launch, tmp_path):
    start = time.monotonic()
    process = launch(FAILS)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - start < 30
    last = err.strip().splitlines()[-1]
    assert (
        "first failure here: rank 2 on " in last and "RuntimeError: bad sample 17" in last and "rank-00002.log" in last
    )
    end = outcome(tmp_path / "logs", ["here"])
    assert end.status == 1 and "bad sample 17" in end.line


def test_ranks_and_their_helpers_die_with_a_killed_launcher_or_a_failed_rank(launch, tmp_path):
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path)!r} + "/pids" + os.environ["RANK"], "w").write(f"{{os.getpid()}} {{child.pid}}\\n")
time.sleep(600)
"""
    process = launch(program, ranks=2)
    paths = [tmp_path / f"pids{rank}" for rank in range(2)]
    until(lambda: all(text_of(path).endswith("\n") for path in paths))
    (first, helper), (second, _) = ([int(pid) for pid in path.read_text().split()] for path in paths)
    os.kill(first, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 137
    until(lambda: not any(alive(pid) for pid in (first, helper, second)), 5)
    for path in paths:
        path.unlink()
    process = launch(program, ranks=1)
    until(lambda: text_of(paths[0]).endswith("\n"))
    rank, helper = (int(pid) for pid in paths[0].read_text().split())
    process.kill()
    until(lambda: not alive(rank), 5)
    os.kill(helper, signal.SIGKILL)  # of a killed launcher's ranks' helpers, SLURM takes care


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_without_heartbeat_is_ended(launch, tmp_path):
    beat = tmp_path / "heartbeat.json"
    program = f"""
import json, time
for step in range(3):
    open({str(beat)!r}, "w").write(json.dumps({{"step": step}}))
    time.sleep(0.3)
time.sleep(600)
"""
    process = launch(program, "--heartbeat", str(beat), "--stale-after", "2", "--start-within", "30", ranks=1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 70 and "no heartbeat for 2 s after step 2" in err


def test_a_first_heartbeat_has_its_own_time(tmp_path):
    path = tmp_path / "heartbeat.json"
    path.write_text("{}")  # of the attempt before
    watch = Heartbeat(path, start_within=0.2, stale_after=100)
    assert watch.complaint() is None
    time.sleep(0.3)
    assert "since the start" in watch.complaint()
    path.write_text(json.dumps({"step": 4}))
    assert watch.complaint() is None
    assert Heartbeat(path, start_within=0, stale_after=0).complaint() is None


def test_75_is_0_where_srun_would_take_it_for_a_failure(launch, tmp_path):
    process = launch("import sys; sys.exit(75)", "--zero-when-stopped", ranks=1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert outcome(tmp_path / "logs", ["here"]).status == 75


def test_the_place_in_a_step_is_slurms():
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": "1"}
    assert Place.of(step, "node1:20123") == Place(node=1, num_nodes=2, master_address="node1", master_port=20123)
    with pytest.raises(ValueError, match="--ntasks-per-node=1"):
        Place.of({**step, "SLURM_NTASKS": "16"}, "node1:20123")
    for master in (None, "node1", "node1:http"):
        with pytest.raises(ValueError, match=r"--master: .* HOST:PORT"):
            Place.of(step, master)
    batch = {key: value for key, value in step.items() if key != "SLURM_STEP_ID"}  # variables of a batch shell
    assert Place.of(batch, None).num_nodes == 1


def failure(rank, time, line, **keywords):
    return Failure(rank=rank, host="h", status=1, line=line, log="l", time=time, **keywords)


def test_the_cause_is_told_from_its_consequences():
    lost = failure(0, 1.0, "RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:1234")
    cause = failure(3, 1.4, "ValueError: bad sample")
    told = failure(5, 0.5, "killed by SIGTERM", after_stop=True)
    assert first_failure([lost, told, cause]) is cause
    assert first_failure([lost, told]) is lost
    assert first_failure([told]) is told
    assert first_failure([]) is None


@pytest.mark.parametrize(
    ("log", "status", "line"),
    [
        ("Traceback (most recent call last):\n  File ...\nValueError: no\n", 1, "ValueError: no"),
        ("error: data.train: no such file\n", 2, "data.train: no such file"),
        ("[rank1]: torch.distributed.DistBackendError: NCCL\nstep 3\n", 1, "torch.distributed.DistBackendError: NCCL"),
        ("step 3\n", 1, "no error in its log, exit status 1"),
        ("torch.OutOfMemoryError: CUDA out of memory\nfurther\n", 1, "torch.OutOfMemoryError: CUDA out of memory"),
        ("", 139, "killed by SIGSEGV"),
    ],
)
def test_the_line_of_an_error_is_found(tmp_path, log, status, line):
    (tmp_path / "log").write_text(log)
    assert failure_line(tmp_path / "log", status) == line


def test_a_node_without_a_record_is_named(tmp_path):
    (tmp_path / "node-0000.json").write_text(
        json.dumps({"node": 0, "host": "a", "statuses": {"0": 75}, "failures": [], "stopped_by": ""})
    )
    assert "lost b, which left no word" in outcome(tmp_path, ["a", "b"]).line
    (tmp_path / "node-0000.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record of a node"):
        outcome(tmp_path, ["a"])


def test_what_keeps_the_launcher_from_starting_is_told_by_its_record(tmp_path, monkeypatch):
    for name, value in {"STEP_ID": 0, "STEP_NUM_NODES": 1, "NTASKS": 1, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    words = ["--ranks-per-node", "1", "--logs", str(tmp_path), "--master"]
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch_or_tell(parse([*words, f"here:{port}", "true"])) == 1  # another life gets another port
    end = outcome(tmp_path, ["here"])
    assert end.status == 1 and end.line.startswith("failed first by the launcher on ") and "(log" not in end.line
    assert f"exit status 1: MASTER_PORT: {port} of " in end.line
    assert launch_or_tell(parse([*words, "nowhere", "true"])) == 2
    end = outcome(tmp_path, ["here"])
    assert end.status == 2 and "exit status 2: --master: nowhere; inside a SLURM step" in end.line
