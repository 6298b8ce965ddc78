"""Ranges of a tensor's values as boxes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megachameleon.checkpoint.boxes import Box, boxes_of_range, overlap, within


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start, stop = sorted(draw(st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2)))
    return shape, start, stop


@given(ranges())
def test_boxes_hold_the_range_in_order_once_and_contiguously(case):
    shape, start, stop = case
    values = torch.arange(math.prod(shape)).view(shape)
    whole = Box((0,) * len(shape), shape)
    parts = [values[within(whole, box)] for box in boxes_of_range(shape, start, stop)]
    assert all(part.is_contiguous() for part in parts)
    assert [int(value) for part in parts for value in part.flatten()] == list(range(start, stop))
    assert len(parts) <= 2 * len(shape) - 1


@pytest.mark.parametrize(
    ("start", "stop", "count"),
    [(0, 36, 1), (5, 5, 0), (5, 7, 1), (3, 5, 2), (4, 20, 2), (6, 18, 4), (12, 36, 1), (1, 35, 5)],
)
def test_no_box_more_than_needed(start, stop, count):
    assert len(list(boxes_of_range((3, 3, 4), start, stop))) == count


def test_a_number_is_a_box_without_axes():
    assert list(boxes_of_range((), 0, 1)) == [Box((), ())]


@st.composite
def pairs(draw):
    axes = draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 4)] * axes)
    places = st.tuples(*[st.integers(0, 4)] * axes)
    return Box(draw(places), draw(sizes)), Box(draw(places), draw(sizes))


@given(pairs())
def test_an_overlap_is_what_both_hold(case):
    def held(box):
        space = torch.zeros([8] * len(box.shape), dtype=torch.bool)
        space[within(Box((0,) * len(box.shape), tuple(space.shape)), box)] = True
        return space

    one, other = case
    shared = overlap(one, other)
    expected = held(one) & held(other)
    assert torch.equal(held(shared), expected) if shared else not expected.any()
