"""The transformer_engine backend, wired to a stand-in of the package: what is called, and with what."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("stand_in_transformer_engine.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["documents", "stream", "groups", "rms"])
def test_logits_gradients_and_checkpoints_are_those_of_torch(found, case):
    assert found[case]["error"] < 1e-5
    assert found[case]["same_keys"]


def test_each_operation_reaches_transformer_engine(found):
    calls = {case: set(values["calls"]) for case, values in found.items()}
    everywhere = {"('linear', False)", "('norm', 'rms')"}
    assert calls["documents"] == everywhere | {"('attention', 'thd')", "('norm', 'layer')"}
    assert calls["stream"] == everywhere | {"('attention', 'sbhd')", "('norm', 'layer')"}
    assert calls["groups"] == everywhere | {"('attention', 'thd')"}  # heads with their own affine are torch's
    assert calls["rms"] == everywhere | {"('attention', 'sbhd')"}


def test_weight_gradients_go_straight_to_the_sum(found):
    assert found["training"]["calls"] == ["('linear', True)"]


def test_recipes_of_fp8(found):
    assert found["te_delayed"]["calls"] == ["('fp8', 'delayed', 'hybrid', 1024, 'max')"]
    assert found["te_tensorwise"]["calls"] == ["('fp8', 'tensorwise', 'hybrid')"]


def test_userbuffers_are_made_and_named(found):
    names = [f"('userbuffers', '{name}', True, True)" for name in ("fc1", "fc2", "proj", "qkv")]
    assert found["userbuffers"]["calls"] == [*names, "('userbuffers', [64, 32], 2, ['none'], 'nccl')"]
