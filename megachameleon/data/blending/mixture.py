"""The shares of a stage: by samples or by tokens, and with a target for picture tokens. The same on every machine.

Tokens here are labels with loss, and picture tokens those of them that are picture codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from math import gcd, lcm
from typing import Literal, Protocol

BISECTIONS = 70
"""Halvings of the interval around the tilt; what is left of it is far below `GRID`."""
GRID = Decimal(1).scaleb(-15)
"""Tilted weights are multiples of it, so that their last digits cannot differ."""


class Contents(Protocol):
    """What matters of a dataset; `PackedDataset` has it."""

    @property
    def labels_per_sample(self) -> Fraction:
        """Labels with loss, on average."""
        ...

    @property
    def image_share(self) -> Fraction:
        """The share of them that are picture codes."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a run with one mixture."""

    num_samples: int | None
    """None: until the end of the run; only for the last stage."""
    weights: Mapping[str, float | Fraction]
    """Shares by dataset; they need not add up to one."""
    by: Literal["samples", "tokens"] = "samples"
    """What they are shares of."""
    image_tokens: float | None = None
    """Wanted share of picture tokens; weights are changed as little as possible to reach it."""


def sample_weights(stage: Stage, datasets: Mapping[str, Contents], where: str) -> dict[str, Fraction]:
    """Shares of samples by dataset that give what the stage asks for.

    Args:
        where: names the stage in errors.

    Raises:
        ValueError: the datasets cannot give that share of picture tokens, or one with weight has no labels.
    """
    weights = {name: Fraction(weight) for name, weight in stage.weights.items() if weight}
    if stage.by == "samples" and stage.image_tokens is None:
        return weights
    lengths = {name: datasets[name].labels_per_sample for name in weights}
    for name, length in lengths.items():
        if not length:
            raise ValueError(
                f"{where}.weights.{name}: its documents have one id each, so nothing to learn; take it out"
            )
    if stage.by == "samples":
        # the target is over tokens, so weights become shares of tokens first
        weights = {name: weight * lengths[name] for name, weight in weights.items()}
    if stage.image_tokens is not None:
        shares = {name: datasets[name].image_share for name in weights}
        weights = tilted(weights, shares, stage.image_tokens, f"{where}.image_tokens")
    return {name: weight / lengths[name] for name, weight in weights.items()}


def tilted(
    weights: Mapping[str, Fraction], shares: Mapping[str, Fraction], target: float, where: str
) -> dict[str, Fraction]:
    """The weights nearest to the given ones (in relative entropy) whose mean of `shares` is the target.

    They are the given ones times exp(tilt x share). Decimal's exp is rounded correctly, so all machines agree.

    Raises:
        ValueError: the target is not between the smallest and the largest share.
    """
    low, high = min(shares.values()), max(shares.values())
    if not low < Fraction(target) < high:
        raise ValueError(
            f"{where}: {target} cannot be reached, because the shares of picture tokens of the stage's datasets lie "
            f"between {float(low):.4f} and {float(high):.4f}; choose a target between them, or add a dataset"
        )
    # a context of our own, since a caller's may have other precision or rounding
    with localcontext(Context(prec=30)):
        aim = Decimal(target)
        given = {name: _decimal(weight / sum(weights.values())) for name, weight in weights.items()}
        share = {name: _decimal(value) for name, value in shares.items()}
        bound = Decimal(1)
        while not _mean(given, share, -bound) < aim < _mean(given, share, bound):
            # the tilt has no limit: the nearer the target to the smallest or largest share, the larger
            bound *= 2
        below, above = -bound, bound
        for _ in range(BISECTIONS):
            middle = (below + above) / 2
            below, above = (middle, above) if _mean(given, share, middle) < aim else (below, middle)
        changed = _tilt(given, share, above)
        total = sum(changed.values())
        # at least one step of the grid: a dataset with weight must not vanish by rounding
        return {name: Fraction(max((weight / total).quantize(GRID), GRID)) for name, weight in changed.items()}


def whole_numbers(weights: Mapping[str, float | Fraction]) -> dict[str, int]:
    """The same proportions in whole numbers without a common divisor."""
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    common = lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * common) for name, weight in exact.items()}
    divisor = gcd(*whole.values())
    return {name: weight // divisor for name, weight in whole.items()}


def _tilt(weights: Mapping[str, Decimal], shares: Mapping[str, Decimal], tilt: Decimal) -> dict[str, Decimal]:
    return {name: weight * (tilt * shares[name]).exp() for name, weight in weights.items()}


def _mean(weights: Mapping[str, Decimal], shares: Mapping[str, Decimal], tilt: Decimal) -> Decimal:
    changed = _tilt(weights, shares, tilt)
    return sum((weight * shares[name] for name, weight in changed.items()), Decimal()) / sum(changed.values())


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)
