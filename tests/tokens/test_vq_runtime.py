"""The threads of a process that trains an image tokenizer."""

import os

import pytest
import torch

from megachameleon.tokens.vq.runtime import process_group


@pytest.mark.parametrize(("threads", "variable", "expected"), [(3, "2", [3]), (None, "2", []), (None, None, [2])])
def test_threads_are_those_of_the_flag_of_the_environment_or_a_share(monkeypatch, threads, variable, expected):
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with process_group(threads):
        assert given == expected
