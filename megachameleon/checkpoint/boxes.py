"""Boxes of tensors: what a contiguous range of a tensor's values looks like with the tensor's axes.

The distributed optimizer cuts the values of all parameters, end to end, into equal shares. A share begins and ends
anywhere in a matrix; files store boxes, which any other division can find again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor."""

    offset: Shape
    """Of its first value, an entry for each axis of the global tensor."""
    shape: Shape
    """An entry for each axis."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The fewest boxes that hold the values `start` to `stop` of a tensor in row-major order, in that order.

    Each is contiguous in memory. There are at most 2 n - 1 of them for n axes: the rest of a row that has begun, whole
    rows, and the beginning of a row, where both rests are ranges of a tensor with one axis less.
    """
    # pieces of a parameter that a share does not reach have ranges that end before they begin
    if start >= stop:
        return
    if len(shape) <= 1:
        # a tensor without axes has one value, and its box no offset
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    rows, row = shape[0], shape[1:]
    size = math.prod(row)
    first, begun = divmod(start, size)
    last, rest = divmod(stop, size)
    if first == last:
        yield from _in_row(first, row, begun, rest)
        return
    if begun:
        yield from _in_row(first, row, begun, size)
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in row)), (last - first, *row))
    if rest:
        assert last < rows, f"values {start} to {stop} of a tensor of shape {shape}"
        yield from _in_row(last, row, 0, rest)


def _in_row(number: int, row: Shape, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(row, start, stop):
        yield Box((number, *box.offset), (1, *box.shape))


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes of the same tensor share."""
    low = tuple(map(max, one.offset, other.offset))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return Box(low, tuple(b - a for a, b in zip(low, high, strict=True)))


def within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """The slices that cut `inner` out of the values of `outer`."""
    return tuple(slice(b - a, b - a + n) for a, b, n in zip(outer.offset, inner.offset, inner.shape, strict=True))
