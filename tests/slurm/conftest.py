"""A running cluster, and what tests ask of it. `make test-slurm` is how they are started."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, trackers, why_not
from cluster_commands import Slurm

RUNS = "MEGACHAMELEON_TEST_SLURM"
"""Set by `make test-slurm`: a cluster is started for whoever asked for one, not for every run of slow tests."""


@pytest.fixture(scope="session")
def make_cluster() -> Iterator[Callable[[str], Cluster]]:
    """A function that has the cluster run with a process tracker; at most one at a time."""
    if RUNS not in os.environ:
        pytest.skip("starts a SLURM cluster: use `make test-slurm`")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    prefix = Path(os.environ.get("MEGACHAMELEON_SLURM", "/tmp/megachameleon-slurm"))
    running: list[Cluster] = []

    def make(tracker: str) -> Cluster:
        if running and running[0].tracker == tracker:
            return running[0]
        for cluster in running:
            cluster.stop()
        running[:] = [Cluster(prefix, num_nodes=4, cpus=8, gpus=2, tracker=tracker)]
        running[0].start()
        return running[0]

    yield make
    for cluster in running:
        cluster.stop()


@pytest.fixture(params=trackers())
def any_slurm(request, make_cluster, job_folder) -> Slurm:
    """The cluster with each process tracker that works here: signals reach other processes under each."""
    return Slurm(make_cluster(request.param), job_folder)


@pytest.fixture
def slurm(make_cluster, job_folder) -> Slurm:
    """The cluster with the tracker that it has, or the first that works here."""
    return Slurm(make_cluster(trackers()[0]), job_folder)


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory) -> Path:
    """Where jobs write their logs."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def run_yaml(tmp_path_factory) -> Path:
    """A run of the debug preset that lasts some seconds, to be given an output_dir."""
    from tiny_corpus import corpus_overrides, write_corpus

    from megachameleon.config import load_config, save_config

    folder = tmp_path_factory.mktemp("slurm")
    settings = [
        *corpus_overrides(write_corpus(folder)), "training.num_steps=240", "training.validate_every=0",
        "checkpoint.every=40", "optimizer.lr=1e-3", f"output_dir={folder / 'run'}",
    ]  # fmt: skip
    save_config(load_config("debug", settings), folder / "run.yaml")
    return folder / "run.yaml"
