"""What replicas answer for, and counts of updates where Adam keeps them in other places."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megachameleon.parallel.optimizer_state import HeldState, own_share, set_updates_done, updates_done


def held(length, *, first=0, replicated=True):
    values = torch.arange(first, first + length)
    return HeldState(
        parameter=None, start=first, stop=first + length, tensors={"exp_avg": values}, replicated=replicated
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_replicas_share_what_all_hold_equally_and_once(lengths, replicas):
    shares = [list(own_share([held(length) for length in lengths], rank, replicas)) for rank in range(replicas)]
    sizes = [sum(part.stop - part.start for part in share) for share in shares]
    assert sum(sizes) == sum(lengths) and max(sizes) - min(sizes) <= 1
    joined = [int(value) for share in shares for part in share for value in part.tensors["exp_avg"]]
    assert joined == [value for length in lengths for value in range(length)]
    assert all(
        part.tensors["exp_avg"][0] == part.start and part.stop > part.start for share in shares for part in share
    )


def test_what_a_replica_alone_holds_is_its_own():
    alone = held(5, first=3, replicated=False)
    for rank in range(2):
        share = list(own_share([alone, held(4)], rank, 2))
        assert share[0] is alone
        assert (share[1].start, share[1].stop) == (2 * rank, 2 * rank + 2)


def adam_of_torch():
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)) for _ in range(3)])
    for parameter in adam.param_groups[0]["params"]:
        parameter.grad = torch.ones(2)
    return adam


def adam_of_apex():
    """It counts in its groups, and not in one without parameters."""
    groups = [{"params": []}, {"params": [1], "step": 0}]
    return SimpleNamespace(state={}, param_groups=groups)


@pytest.mark.parametrize("chained", [False, True])
def test_updates_are_counted_on_in_torch(chained):
    adam = adam_of_torch()
    adam.step()
    adam.step()
    part = SimpleNamespace(optimizer=adam)
    empty = SimpleNamespace(optimizer=None)
    optimizer = SimpleNamespace(chained_optimizers=[empty, part]) if chained else part
    assert updates_done(optimizer) == 2
    set_updates_done(optimizer, 7)
    adam.step()
    assert [float(state["step"]) for state in adam.state.values()] == [8, 8, 8]


def test_updates_are_counted_on_in_apex():
    optimizer = SimpleNamespace(optimizer=adam_of_apex())
    assert updates_done(optimizer) == 0
    set_updates_done(optimizer, 7)
    assert updates_done(optimizer) == 7
    assert [group["step"] for group in optimizer.optimizer.param_groups] == [7, 7]
