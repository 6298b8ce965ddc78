"""The whole demo in its quick profile, through the command line, twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def run_demo(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.demo.run_demo", "--quick", "--processes", "2", "--run", str(folder)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_from_raw_data_to_report(tmp_path):
    first = run_demo(tmp_path)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    assert first.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "not here yet" not in page
    assert "Within" in page  # layouts agree
    steps = [json.loads(line)["step"] for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6

    again = run_demo(tmp_path)
    assert again.returncode == 0
    assert again.stderr.count("done") == 9
