"""The check of nodes: what nvidia-smi says, what one machine measures, and who is judged bad.

No GPU was at hand: the outputs of nvidia-smi below are written after its documented format.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megachameleon.launching.inspection import exclude, read_excluded
from megachameleon.launching.judging import Limits, judge, require_usable_folders, table
from megachameleon.launching.node_check import NodeCheck, available_memory_gib, look_at_itself, read_check
from megachameleon.launching.nvidia_smi import Gpu, parse_flags, parse_gpus, query_gpus
from megachameleon.launching.preflight import ring_rounds

REPOSITORY = Path(__file__).parents[2]
TWO_H100 = """\
0, NVIDIA H100 80GB HBM3, 31, 4, 81559, 1980, 0
1, NVIDIA H100 80GB HBM3, 82, 40210, 81559, 1980, 2
"""
WITHOUT_ECC = "0, NVIDIA GeForce RTX 4090, 45, 512, 24564, 3105, [N/A]\n"
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *index*) printf '0, NVIDIA H100 80GB HBM3, 31, 4, 81559, 1980, 0\\n' ;;
  *event*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field to query.'; exit 2 ;;
  *throttle*) echo 'Active' ;;
  *) echo '[N/A]' ;;
esac
"""


def test_gpus_are_read():
    first, second = parse_gpus(TWO_H100)
    assert (first.name, first.celsius, first.ecc_errors) == ("NVIDIA H100 80GB HBM3", 31.0, 0)
    assert (second.index, second.used_mib, second.max_clock_mhz, second.ecc_errors) == (1, 40210.0, 1980.0, 2)
    assert parse_gpus(WITHOUT_ECC)[0].ecc_errors is None
    assert parse_gpus("\n") == []
    with pytest.raises(RuntimeError, match="Unable to determine the device handle"):
        parse_gpus("Unable to determine the device handle for GPU 0000:01:00.0: Unknown Error\n")
    assert parse_flags("Active\nNot Active\n[N/A]\nYes\n") == [True, False, None, True]


def test_a_driver_that_hangs_is_a_finding(monkeypatch):
    def hang(words, **options):
        raise subprocess.TimeoutExpired(words, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(RuntimeError, match="nvidia-smi: no answer within 60 s"):
        query_gpus()


def test_a_renamed_field_is_asked_by_its_old_name(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (gpu,) = query_gpus()
    assert gpu.slowed is True and gpu.remap_pending is None and gpu.celsius == 31.0
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because'; exit 9\n")
    with pytest.raises(RuntimeError, match="has failed"):
        query_gpus()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert query_gpus() is None


def gpu(**changes):
    fields = {"index": 0, "name": "H100", "celsius": 35.0, "used_mib": 4.0, "total_mib": 81559.0}
    return Gpu(**{**fields, "max_clock_mhz": 1980.0, "ecc_errors": 0, **changes})


def checks(count=4, **changes):
    """`count` equal nodes; `changes` are of the last."""
    values = {
        "gpus": [gpu(), gpu(index=1)], "memory_gib": 900.0, "clock_offset": 0.0, "write_gb_per_second": 2.0,
        "read_gb_per_second": 4.0, "inside_gb_per_second": 300.0, "pair_gb_per_second": {"x": 40.0, "y": 41.0},
    }  # fmt: skip
    nodes = [NodeCheck(host=f"n{number}", **values) for number in range(count - 1)]
    return [*nodes, NodeCheck(host="bad", **{**values, **changes})]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"gpus": [gpu()]}, "1 of 2 GPUs"),
        ({"gpus": None}, "0 of 2 GPUs (no nvidia-smi)"),
        ({"gpus": [gpu(), gpu(index=1, ecc_errors=3)]}, "GPU 1: 3 uncorrected ECC errors"),
        ({"gpus": [gpu(celsius=88.0), gpu()]}, "GPU 0: 88 °C before work"),
        ({"gpus": [gpu(used_mib=40960.0), gpu()]}, "GPU 0: 40.0 GiB in use by nobody's job"),
        ({"gpus": [gpu(slowed=True), gpu()]}, "slowed by hardware"),
        ({"gpus": [gpu(remap_pending=True), gpu()]}, "needs a reset"),
        ({"gpus": [gpu(max_clock_mhz=1200.0), gpu()]}, "its fastest clock is 1200 MHz, others' 1980"),
        ({"gpus": [gpu(ecc_errors=None, celsius=None, used_mib=None), gpu()]}, None),
        ({"memory_gib": 500.0}, "host memory 500 GiB, where the median is 900"),
        ({"clock_offset": -3.0}, "clock off by -3.0 s"),
        ({"inside_gb_per_second": 150.0}, "all-reduce inside 150 GB/s, where the median is 300"),
        ({"pair_gb_per_second": {"x": 9.0, "y": 10.0}}, "all-reduce across 10 GB/s, where the median is 41"),
        ({"pair_gb_per_second": {"x": 9.0, "y": 39.0}}, None),  # the partner is slow
        ({"write_gb_per_second": 0.1}, "storage write 0.1 GB/s"),
        ({"problems": ["/data: permission denied"]}, "/data: permission denied"),
    ],
)
def test_bad_nodes_are_named_with_the_reason(changes, reason):
    found = checks(**changes)
    faults = judge(found, [check.host for check in found], Limits(gpus=2))
    assert set(faults) == ({"bad"} if reason else set())
    text = table(found, faults)
    assert text.count("good") == (3 if reason else 4)
    if reason:
        assert reason in "; ".join(faults["bad"])
        assert text.splitlines()[1].startswith("bad ") and reason in text.splitlines()[1]


def test_of_two_nodes_the_slow_one_cannot_be_told():
    found = checks(count=2, inside_gb_per_second=1.0)
    assert judge(found, ["n0", "bad"], Limits(gpus=2)) == {}


def test_a_silent_node_is_bad():
    assert judge(checks(), ["n0", "n1", "n2", "bad", "gone"], Limits()) == {
        "gone": ["no findings: dead, hung or cut off"]
    }


@pytest.mark.parametrize("count", range(1, 9))
def test_each_node_is_measured_with_two_neighbours(count):
    rounds = ring_rounds(count)
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)
    partners = [node for pairs in rounds for pair in pairs for node in pair]
    expected = {1: 0, 2: 1}.get(count, 2)
    assert [partners.count(node) for node in range(count)] == [expected] * count


def test_a_machine_looks_at_itself(tmp_path):
    check = NodeCheck(host="here")
    look_at_itself(check, [tmp_path, tmp_path / "missing"], 2**20)
    assert check.write_gb_per_second > 0 and check.read_gb_per_second > 0 and check.memory_gib > 0
    assert check.problems == [f"{tmp_path / 'missing'}: no such file or directory"]
    assert list(tmp_path.iterdir()) == []
    check.gpus = parse_gpus(TWO_H100)
    check.write(tmp_path)
    assert asdict(read_check(tmp_path / "here.json")) == asdict(check)
    assert available_memory_gib(tmp_path / "nothing") is None


def test_a_folder_that_no_node_can_use_is_an_input_error(tmp_path):
    data = Path("/data")
    wrong = {"problems": ["no route", "/data: no such file or directory", "/data2: full"]}
    require_usable_folders([], [data])
    require_usable_folders([NodeCheck(host="alone", **wrong)], [data])
    require_usable_folders([NodeCheck(host="a", **wrong), NodeCheck(host="b", problems=["no route"])], [data])
    with pytest.raises(ValueError, match=r"^--folders: /data: no such file or directory, on all of 2 nodes; "):
        require_usable_folders([NodeCheck(host="a", **wrong), NodeCheck(host="b", **wrong)], [data])


@pytest.mark.parametrize(("others", "status"), [(["/data: gone"], 2), ([], 3)])
def test_only_bad_nodes_are_written_down(tmp_path, others, status):
    """The findings lie there already; what would make them, srun, is a stub."""
    for name, text in (("srun", "exit 0"), ("scontrol", "echo a b")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    NodeCheck(host="a", problems=["/data: gone"]).write(tmp_path / "results")
    NodeCheck(host="b", problems=others).write(tmp_path / "results")
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a,b", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [
            sys.executable, "-m", "megachameleon.launching.inspection", "--ranks-per-node", "1",
            "--results", "results", "--folders", "/data",
        ],
        cwd=tmp_path, env={**job, "PYTHONPATH": str(REPOSITORY)}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert read_excluded(str(tmp_path / "bad_nodes.txt")) == (() if status == 2 else ("a",))
    assert done.stderr.startswith("error: --folders: /data: gone, on all of 2 nodes; ") == (status == 2)


def test_excluded_nodes_are_kept_once_with_their_reasons(tmp_path):
    path = str(tmp_path / "bad.txt")
    assert read_excluded(path) == ()
    exclude(path, {"n3": ["hot"]})
    exclude(path, {"n3": ["still hot"], "n5": ["slow", "old"]})
    assert read_excluded(path) == ("n3", "n5")
    assert Path(path).read_text().count("hot") == 1 and "slow; old" in Path(path).read_text()


def test_two_ranks_measure_each_other(tmp_path):
    command = [
        "-m", "megachameleon.launching.node", "--ranks-per-node", "2", "--logs", tmp_path / "logs", "--",
        "-m", "megachameleon.launching.preflight", "--results", tmp_path, "--folders", tmp_path,
        "--storage-mb", "1", "--message-mb", "0.1",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env={**environment, "PYTHONPATH": str(REPOSITORY)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    value = json.loads(path.read_text())
    assert value["inside_gb_per_second"] > 0 and value["clock_offset"] == 0 and value["problems"] == []
