"""Jobs in threads: all are done, or the first failure is told and no thread is left."""

import threading

import pytest
import torch

from megachameleon.checkpoint.formats import jobs
from megachameleon.checkpoint.formats.jobs import run_jobs


def run(todo, workers=2):
    run_jobs(todo, workers=workers, what="testing", num_bytes=0)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_jobs_are_done_and_counted(workers):
    done, meters = [], set()

    def job(number):
        def do(meter):
            meter.add(10)
            done.append(number)
            meters.add(meter)

        return do

    run([job(number) for number in range(7)], workers)
    (meter,) = meters
    assert sorted(done) == list(range(7)) and meter.num_bytes == 70
    run([])


def test_the_first_failure_stops_all_and_is_the_one_that_is_told():
    threads, begun, after = threading.active_count(), threading.Event(), []

    def endless(meter):
        begun.set()
        while True:
            meter.add(1)

    def fail(meter):
        begun.wait()
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        run([endless, fail, after.append, after.append])
    assert threading.active_count() == threads and after == []


def test_an_interrupt_stops_all(monkeypatch):
    threads, begun = threading.active_count(), threading.Event()

    def endless(meter):
        begun.set()
        while True:
            meter.add(1)

    def interrupted(*_, **__):
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([endless, endless, endless])
    assert threading.active_count() == threads


def test_torch_computes_with_one_thread_in_each_and_as_before_afterwards():
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        run([lambda meter: seen.append(torch.get_num_threads())] * 3)
        assert seen == [1, 1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
