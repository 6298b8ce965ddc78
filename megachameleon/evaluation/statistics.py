"""Counts of successes with the uncertainty that belongs to them."""

import math


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; (0, 1) without trials. z = 1.96 covers 95 %."""
    if trials == 0:
        return 0.0, 1.0
    # Wilson (1927): unlike rate +- z sigma, it stays within 0 and 1 and is honest for few trials
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    low = 0.0 if successes == 0 else centre - half  # exactly, whatever the rounding
    high = 1.0 if successes == trials else centre + half
    return low, high
