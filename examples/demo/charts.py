"""Line charts as inline SVG that take their colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 34


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points of (x, y), a name for the legend and a colour class `c0` … `c5`; dotted if it is a reference."""

    name: str
    """In the legend."""
    points: tuple[tuple[float, float], ...]
    colour: str
    """A class of the style sheet."""
    markers: bool = False
    dotted: bool = False


def line_chart(series: Sequence[Series], x_label: str, title: str) -> Markup | None:
    """A chart with a legend below it; None when no series has a finite point."""
    finite = [Series(**{**vars(s), "points": tuple(p for p in s.points if all(map(math.isfinite, p)))}) for s in series]
    finite = [s for s in finite if s.points]
    if not finite:
        return None
    xs = [x for s in finite for x, _ in s.points]
    ys = [y for s in finite for _, y in s.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    # a single point has no width to divide by
    x_range = (min(xs), max(*xs, min(xs) + 1e-9))
    y_range = (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / max(y_range[1] - y_range[0], 1e-9)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, v = place(x_range[0], y)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if x_range[0] <= x <= x_range[1]:
            h, _ = place(x, y_range[0])
            parts.append(f'<text x="{h:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 18}" text-anchor="end">{escape(x_label)}</text>')
    for s in finite:
        parts += draw(s, [place(x, y) for x, y in s.points])
    parts.append("</svg>")
    legend = "".join(
        f'<span class="key {s.colour}{" dotted" if s.dotted else ""}">{escape(s.name)}</span>' for s in finite
    )
    return Markup("".join(parts) + f'<div class="legend">{legend}</div>')


def draw(series: Series, places: Sequence[tuple[float, float]]) -> list[str]:
    """The SVG elements of one line."""
    path = " ".join(f"{h:.1f},{v:.1f}" for h, v in places)
    style = f"line {series.colour}{' dotted' if series.dotted else ''}{' thin' if not series.markers else ''}"
    elements = [f'<polyline class="{style}" points="{path}"/>']
    if series.markers:
        for (h, v), (x, y) in zip(places, series.points, strict=True):
            tip = f"<title>{escape(series.name)} at {x:g}: {y:.4g}</title>"
            elements.append(f'<circle class="{series.colour}" cx="{h:.1f}" cy="{v:.1f}" r="3.5">{tip}</circle>')
    return elements


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 10) for n in range(first, last + 1)]
