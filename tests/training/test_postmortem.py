import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megachameleon.training.postmortem import (
    Record,
    all_waiting,
    guilty,
    lost_contact,
    what_became_of,
    whereabouts,
)
from megachameleon.training.pulse import Peer, Pulse
from megachameleon.training.stragglers import StragglerWatch


def record(rank, kind, *, step=40, waiting=False, message="m"):
    return Record(
        rank=rank, host=f"node{rank}", pid=1, kind=kind, step=step, state="training", time=float(rank),
        message=message, waiting=waiting,
    )  # fmt: skip


def test_who_is_guilty():
    lost, died = record(0, "lost"), record(3, "died", message="OSError: gone")
    waits, works = record(1, "hung", waiting=True), record(2, "hung", message="is in read (file.py:1)")
    assert guilty([lost]) is None and guilty([lost, waits]) is None
    assert guilty([lost, works, died]) == "rank 3 (node3) died after step 40: OSError: gone"
    assert guilty([waits, works]) == "not finished with step 41: rank 2 (node2) is in read (file.py:1)"
    behind = record(4, "hung", step=39, message="is in b")
    assert guilty([works, behind]) == "not finished with step 40: rank 4 (node4) is in b"
    others = record(5, "hung", waiting=True, message="waits in c")
    assert all_waiting([waits, others]) == "all wait for each other in step 41: ranks 1 m; ranks 5 waits in c"


def test_a_process_that_has_ended_is_not_alive():
    assert what_became_of(os.getpid()) is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    for _ in range(100):  # a zombie until it is waited for
        if what_became_of(child.pid):
            break
        time.sleep(0.1)
    assert "died" in what_became_of(child.pid)
    child.wait()
    assert "died" in what_became_of(child.pid)


def test_a_wait_is_told_from_work():
    event = threading.Event()
    frames = {}

    def waits():
        event.wait(20)

    def works():
        while not event.is_set():
            sum(range(100))

    threads = [threading.Thread(target=function) for function in (waits, works)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    frames = sys._current_frames()
    places = [whereabouts(frames[thread.ident]) for thread in threads]
    event.set()
    for thread in threads:
        thread.join()
    assert places[1][0].startswith("works (test_postmortem.py:") and not places[1][1]
    assert whereabouts(None) == ("an unknown place", False)


def test_errors_of_others():
    for text in ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4", "NCCL communicator was aborted"):
        assert lost_contact(RuntimeError(text))
    assert lost_contact(dist.DistStoreError("timeout"))
    assert not lost_contact(RuntimeError("out of memory")) and not lost_contact(ValueError("gloo"))


def test_the_pulse_writes_and_ends_a_hung_process(tmp_path):
    seen = threading.Event()
    pulse = Pulse(rank=0, hang_timeout=0.3, start_timeout=20)
    pulse.publish(tmp_path)
    pulse.watch(lambda seconds: seen.set())
    pulse.enter("training")
    pulse.beat(0, first_step=0, num_steps=9)
    assert not seen.wait(0.6), "the first step may take its time"
    pulse.beat(1, loss=2.5)
    assert seen.wait(10)
    pulse.close("stopped", reason="because")
    heartbeat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert {key: heartbeat[key] for key in ("state", "step", "num_steps", "loss", "reason", "pid")} == {
        "state": "stopped", "step": 1, "num_steps": 9, "loss": 2.5, "reason": "because", "pid": os.getpid(),
    }  # fmt: skip
    assert abs(heartbeat["time"] - time.time()) < 60
    assert json.loads((tmp_path / "heartbeats/rank-00000.json").read_text())["state"] == "stopped"
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_the_heartbeat_is_json_whatever_the_loss(tmp_path):
    pulse = Pulse(rank=0)
    pulse.publish(tmp_path)
    pulse.beat(1, loss=float("nan"), samples=8)
    pulse.close("failed", reason="loss is nan")
    heartbeat = json.loads((tmp_path / "heartbeat.json").read_text(), parse_constant=pytest.fail)
    assert (heartbeat["loss"], heartbeat["samples"]) == (None, 8)


def watch(stages, **settings):
    peers = [Peer(rank=rank, host=f"node{rank}", pid=1, stage=stage) for rank, stage in enumerate(stages)]
    return StragglerWatch(peers, factor=1.5, window=3, **settings)


def feed(stragglers, *busy, start=0, seconds=1.0):
    return [line for step in range(1, 4) for line in stragglers.observe(start + step, busy, seconds)]


def test_a_slow_rank_is_named_until_it_keeps_up():
    stragglers = watch([0, 0, 1, 1])
    assert feed(stragglers, 0.1, 0.1, 0.3, 0.3) == [], "stages have different work"
    [line] = feed(stragglers, 0.1, 0.2, 0.3, 0.3, start=3)
    assert line == (
        "rank 1 (node1) is slow: forward passes take 200 ms a step, 2.0 times the 100 ms that the others with the same "
        "work take (steps 4 to 6)"
    )
    assert feed(stragglers, 0.1, 0.2, 0.3, 0.3) == [], "said once"
    assert feed(stragglers, 0.1, 0.1, 0.3, 0.3) == ["rank 1 (node1) keeps up again"]
    assert feed(stragglers, 0.001, 0.002, 0.3, 0.3) == [], "too little of a step to matter"


def test_without_others_of_the_same_work_a_rank_is_compared_with_its_own_best():
    stragglers = watch([0, 1])
    assert feed(stragglers, 0.1, 0.4) == []
    [line] = feed(stragglers, 0.1, 0.8)
    assert line.startswith("rank 1 (node1) is slow") and "400 ms that it took at its best" in line


@pytest.mark.parametrize("busy", [(), (0.0, 0.0)])
def test_nothing_is_said_without_times(busy):
    assert feed(watch([0, 0]), *busy) == []
