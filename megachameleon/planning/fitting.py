"""Constants fitted to published step times, and errors on those that were not fitted to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megachameleon.planning.cost import cost_of
from megachameleon.planning.efficiencies import FITTED, Efficiencies
from megachameleon.planning.hardware import CLUSTERS
from megachameleon.planning.published import Point

CONSTANTS = ("gemm_ampere", "gemm_hopper", "gemm_hopper_fp8", "gemm_traffic", "memory", "nvlink", "overlapped_tensor")
"""What is fitted; all are fractions between 0 and 1."""
START = replace(FITTED, **dict.fromkeys(CONSTANTS, 0.7))
"""Where every fit starts, so that it does not depend on an earlier one."""
ROUNDS = 12
LOWEST = 0.05
"""No constant of the physical world is smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validated:
    """One point beside what was predicted without it."""

    point: Point
    """What was measured."""
    predicted_seconds: float
    """Of a step."""

    @property
    def error(self) -> float:
        """Predicted over measured speed, less 1: positive where the prediction is too fast."""
        return self.point.seconds / self.predicted_seconds - 1


def predict(point: Point, efficiencies: Efficiencies = FITTED) -> float:
    """Seconds of a step of a published run."""
    return cost_of(point.shape, point.layout, CLUSTERS[point.cluster], efficiencies, point.software).total


def halves(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Every second point of the list that is in the order of sources, and the others: each source is in both halves."""
    return list(points[0::2]), list(points[1::2])


def fit(points: Sequence[Point], names: Sequence[str] = CONSTANTS, start: Efficiencies = START) -> Efficiencies:
    """The constants with the least sum of squared relative errors (Levenberg and Marquardt), between `LOWEST` and 1.

    Deterministic. Each round solves for the change of logarithms that would be best if errors were linear in them, and
    is damped the more the worse the round before went.
    """

    def errors(constants: np.ndarray) -> np.ndarray:
        efficiencies = replace(start, **dict(zip(names, np.exp(constants).tolist(), strict=True)))
        return np.array([point.seconds / predict(point, efficiencies) - 1 for point in points])

    # In logarithms, constants stay positive whatever the step.
    best = np.log([getattr(start, name) for name in names])
    current, damping = errors(best), 1e-2
    for _ in range(ROUNDS):
        steps = 1e-4 * np.eye(len(names))
        slopes = np.stack([(errors(best + step) - current) / 1e-4 for step in steps], axis=1)
        normal = slopes.T @ slopes
        # 1e-6: a constant on which no point depends has no slope, and nothing could be solved.
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-6), -slopes.T @ current)
        # 0 is the logarithm of 1: nothing reaches more than its peak.
        candidate = np.clip(best + change, np.log(LOWEST), 0.0)
        result = errors(candidate)
        if result @ result < current @ current:
            best, current, damping = candidate, result, damping / 4
        else:
            damping *= 8
    return replace(start, **{name: round(float(value), 3) for name, value in zip(names, np.exp(best), strict=True)})


def held_out(points: Sequence[Point], fitter: Callable[[Sequence[Point]], Efficiencies] = fit) -> list[Validated]:
    """Every point, predicted with constants fitted to the half that it is not in, in the order given."""
    first, second = halves(points)
    of_first, of_second = fitter(first), fitter(second)
    return [
        Validated(point=point, predicted_seconds=predict(point, of_second if i % 2 == 0 else of_first))
        for i, point in enumerate(points)
    ]


def mean_error(results: Sequence[Validated]) -> float:
    """Mean of absolute errors."""
    return sum(abs(result.error) for result in results) / len(results)


def max_error(results: Sequence[Validated]) -> float:
    """Largest absolute error."""
    return max(abs(result.error) for result in results)
