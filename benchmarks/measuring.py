"""Interleaved timing: every contestant once a round, in an order that changes, so that all meet the same machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.parking import Parking


class Stepper(Protocol):
    """What can be measured."""

    def step(self, number: int) -> float:
        """Do all of it once on input `number`; returns a number that waits for the result, such as the loss."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One timed step."""

    contestant: str
    """Its name."""
    round: int
    """From 0."""
    wall_seconds: float
    """With the wait for the device."""
    cpu_seconds: float
    """Of all threads of the process."""
    loss: float
    """What `Stepper.step` returned."""
    peak_bytes: int | None
    """Its own memory at the peak of the step: what it keeps between steps and what the step adds. GPU only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, quartiles and extremes."""

    median: float
    low_quartile: float
    high_quartile: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value; quartiles by linear interpolation."""
        ordered = sorted(values)
        low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(median=middle, low_quartile=low, high_quartile=high, least=ordered[0], most=ordered[-1])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int
    warmup: int
    """Rounds before the first one that counts."""
    steps_per_turn: int
    """Timed steps of a contestant in a round."""
    settle: int
    """Untimed steps at the start of a turn, after which caches and allocator are its own again."""


def interleave(
    contestants: Mapping[str, Stepper],
    plan: Plan,
    device: torch.device,
    parking: Parking,
    advance: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Measure; warm-up rounds are left out of what is returned.

    Args:
        advance: called after each turn.
    """
    timings, counts = [], dict.fromkeys(contestants, 1)  # step 0 was the check
    for number in range(-plan.warmup, plan.rounds):
        for name in order_of(list(contestants), number):
            with parking.turn_of(name):
                for step in range(plan.settle + plan.steps_per_turn):
                    timing = _timed_step(name, contestants[name], number, counts[name], device, parking)
                    counts[name] += 1
                    if number >= 0 and step >= plan.settle:
                        timings.append(timing)
            advance()
    return timings


def order_of(names: list[str], round_number: int) -> list[str]:
    """The order of a round, from a Williams design.

    Over as many rounds as there are names (twice as many if they are odd) each is first, second, ... equally often, and
    each follows each other one equally often: what one leaves in caches and allocator favours nobody.
    """
    count = len(names)
    # Williams (1949): 0, 1, n-1, 2, n-2, ... turned on by one each round
    zigzag = [(i + 1) // 2 if i % 2 else (count - i // 2) % count for i in range(count)]
    order = [names[(place + round_number) % count] for place in zigzag]
    return order[::-1] if count % 2 and round_number // count % 2 else order


def by_round(timings: Sequence[Timing], name: str, value: Callable[[Timing], float]) -> list[float]:
    """The median of a contestant's steps in each round."""
    own = [timing for timing in timings if timing.contestant == name]
    rounds = sorted({timing.round for timing in own})
    return [statistics.median(value(t) for t in own if t.round == number) for number in rounds]


def ratios(timings: Sequence[Timing], name: str, reference: str, value: Callable[[Timing], float]) -> Iterator[float]:
    """Round by round, how many times the reference's time a contestant takes."""
    pairs = zip(by_round(timings, name, value), by_round(timings, reference, value), strict=True)
    return (own / other for own, other in pairs)


def _timed_step(
    name: str, contestant: Stepper, round_number: int, step: int, device: torch.device, parking: Parking
) -> Timing:
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = contestant.step(step)
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # others' memory stands on the device as well, so only what the step adds is counted, and its own
    peak = torch.cuda.max_memory_allocated() - before + parking.kept_bytes[name] if on_gpu else None
    return Timing(contestant=name, round=round_number, wall_seconds=wall, cpu_seconds=cpu, loss=loss, peak_bytes=peak)
