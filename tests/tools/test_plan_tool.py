"""tools/plan.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(*arguments):
    command = [sys.executable, str(ROOT / "tools/plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_a_layout_is_planned_without_a_gpu(tmp_path):
    picture = tmp_path / "plan.html"
    arguments = ("chameleon_34b", "--gpus", "1024", "--tokens", "9.2T", "--price", "2.5", "--html", str(picture))
    result = plan(*arguments, "parallel.pipeline_parallel=4")
    assert result.returncode == 0, result.stderr
    for text in ("TP4 PP4 DP64", "pipeline bubble", "activations", "mfu_causal", "GPU-hours", "at 2.5 an hour"):
        assert text in result.stdout
    assert "<svg" in picture.read_text()


def test_a_search_as_json_is_sorted():
    result = plan("chameleon_7b", "--cluster", "a100", "--gpus", "1024", "--search", "--json", "--top", "4")
    found = json.loads(result.stdout)
    seconds = [one["step_seconds"]["total"] for one in found]
    assert len(found) == 4 and seconds == sorted(seconds) and all(one["fits"] for one in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["chameleon_7b", "--cluster", "h10"],
            "error: --cluster h10: neither a file nor a cluster; did you mean 'h100'?",
        ),
        (["chameleon_34b", "--gpus", "100"], "does not divide the 100 processes"),
        (["chameleon_34b", "--gpus", "4", "--search"], "error: no layout of"),
        (["chameleon_7b", "--gpus", "8", "--tokens", "many"], "error: --tokens many: expected a number such as 9.2T"),
        (["chameleon_7b", "--gpus", "0"], "error: --gpus: 0 must be at least 1"),
        (["chameleon_7b", "--search", "--top", "0"], "error: --top: 0 must be at least 1"),
        (["chameleon_7b", "--price", "-2.5"], "error: --price: -2.5 must be a number, 0 or more"),
        ([], "error: config: give a preset or a YAML file"),
    ],
)
def test_mistakes_are_one_line_and_status_two(arguments, message):
    result = plan(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_plan_that_does_not_fit_is_shown_and_refused():
    result = plan("chameleon_34b", "--gpus", "256", "parallel.tensor_parallel=1", "parallel.sequence_parallel=false")
    assert result.returncode == 2 and "weights" in result.stdout
    assert "does not fit" in result.stderr and "too much; the largest part is" in result.stderr
