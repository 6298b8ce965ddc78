"""A request to stop that comes while the program ends must not change its exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from megachameleon.training.stopping import ignore_requests, listen
with listen():
    pass
ignore_requests()
os.kill(os.getpid(), signal.{name})
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_during_shutdown_leaves_the_exit_status(name):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)], cwd=Path(__file__).parents[2], check=False, timeout=60
    )
    assert done.returncode == 75
