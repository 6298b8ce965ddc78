"""What tests ask of a cluster, in words like a person's."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

REPOSITORY = Path(__file__).parents[2]


class Slurm:
    """The cluster's commands, as a person would use them from the login node."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def call(self, *words: object, **variables: object) -> str:
        """The output of a command run in the repository; fails with everything it said."""
        environment = {**self.cluster.environment(), "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [str(word) for word in words],
            env={**environment, **{key: str(value) for key, value in variables.items()}},
            cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def launch(self, config: Path, *words: object, nodes: int = 2, ranks: int = 1, **variables: object) -> str:
        """Submit with tools/launch.py; returns the job's id."""
        return self.call(
            sys.executable, "tools/launch.py", config, "--nodes", nodes, "--gpus-per-node", ranks, "--time", 20,
            "--parsable", f"--sbatch=--output={self.folder}/%j.log", *words, **variables,
        )  # fmt: skip

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def log(self, job: str) -> str:
        """What the job has written so far."""
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 600, job: str = "") -> None:
        """Look until it holds; if it does not, show the job's log."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"waited {seconds:.0f} s for: {what}\n{self.log(job)[-3000:]}"
            time.sleep(0.3)

    def until_state(self, job: str, *states: str) -> None:
        """Until the job is in one of the states."""
        self.until(lambda: self.field(job, "JobState") in states, f"{job} is {states}", job=job)

    def until_step(self, run: Path, step: int, job: str) -> None:
        """Until the run has trained so far."""
        metrics = run / "metrics.jsonl"
        self.until(
            lambda: metrics.exists() and metrics.read_text().count("\n") >= step, f"{run} is at step {step}", job=job
        )

    def let_again(self, job: str) -> None:
        """Wait until the job is requeued, and spare it the two minutes that SLURM makes it wait."""
        self.until(lambda: int(self.field(job, "Restarts")) > 0, "it is requeued", job=job)
        self.until_state(job, "PENDING")
        time.sleep(2)  # in the same second the node would refuse it: its credential was just revoked
        # a test that moved the end has shortened the limit of the next life as well
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=20")
