"""The planner beside what was published: the error table of docs/planning.md, and the paper's own runs."""

from collections.abc import Callable, Sequence
from dataclasses import fields

from megachameleon.planning.efficiencies import Efficiencies
from megachameleon.planning.fitting import (
    CONSTANTS,
    Validated,
    fit,
    halves,
    held_out,
    max_error,
    mean_error,
    predict,
)
from megachameleon.planning.published import Point, unfitted


def error_table(points: Sequence[Point]) -> list[str]:
    """Markdown: every point with what was measured and what constants from the other half predict."""
    results = held_out(points)
    lines = ["| source | run | GPUs | layout | measured | predicted | error |", "|---|---|---|---|---|---|---|"]
    for result in results:
        point = result.point
        cells = (
            point.family,
            point.name,
            f"{point.layout.world_size:,}",
            point.layout.describe(),
            f"{point.teraflops(point.seconds):.1f}",
            f"{point.teraflops(result.predicted_seconds):.1f}",
            f"{100 * result.error:+.1f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *error_summary(points, results)]


def error_summary(points: Sequence[Point], results: Sequence[Validated]) -> list[str]:
    """Mean and largest errors: of both halves, of each source when nothing of it was fitted to, and in sample."""
    first, second = halves(points)
    families = list(dict.fromkeys(point.family for point in points))
    # Slices as in `halves`: results at even places are of the first half.
    rows: list[tuple[str, Sequence[Validated]]] = [
        (f"all {len(points)}, each predicted from the other half", results),
        (f"{len(first)} predicted from the other {len(second)}", results[0::2]),
        (f"{len(second)} predicted from the other {len(first)}", results[1::2]),
        *((f"{family}, from all other sources", _without(points, family)) for family in families),
        (f"all {len(points)}, fitted to all of them", _with(points, points, fit)),
        *((f"{family}, never fitted to", found) for family, found in _unfitted(fit(points)).items()),
    ]
    lines = ["| points | mean error | largest |", "|---|---|---|"]
    return lines + [f"| {name} | {mean_error(found):.1%} | {max_error(found):.1%} |" for name, found in rows]


def constants_table(points: Sequence[Point]) -> list[str]:
    """Markdown: fitted constants, from all points and from each half."""
    columns = [fit(points), *(fit(half) for half in halves(points))]
    lines = ["| constant | all | one half | the other |", "|---|---|---|---|"]
    for field in fields(Efficiencies):
        if field.name in CONSTANTS:
            lines.append(f"| {field.name} | {' | '.join(f'{getattr(c, field.name):.3f}' for c in columns)} |")
    return lines


def _unfitted(constants: Efficiencies) -> dict[str, list[Validated]]:
    found: dict[str, list[Validated]] = {}
    for point in unfitted():
        found.setdefault(point.family, []).append(Validated(point=point, predicted_seconds=predict(point, constants)))
    return found


def _without(points: Sequence[Point], family: str) -> list[Validated]:
    return _with([p for p in points if p.family != family], [p for p in points if p.family == family], fit)


def _with(
    known: Sequence[Point], asked: Sequence[Point], fitter: Callable[[Sequence[Point]], Efficiencies]
) -> list[Validated]:
    constants = fitter(known)
    return [Validated(point=point, predicted_seconds=predict(point, constants)) for point in asked]
