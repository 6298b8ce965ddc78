"""Curves of many runs as one SVG picture: panels side by side, a line a run, a mark for each alarm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PANEL_WIDTH, PANEL_HEIGHT = 250, 150
"""In pixels, as are all sizes here."""
LEFT, TOP, GAP_X, GAP_Y = 64, 46, 56, 46
COLOURS = {"text": "#1f6f8b", "image": "#c8553d", "loss": "#444444"}
MOST_POINTS = 100
"""Of a line."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run in one panel."""

    values: Sequence[float]
    """By step, from 1; NaN is left out."""
    colour: str
    """As SVG takes it."""
    marks: Sequence[int] = ()
    """Steps with an alarm: triangles."""
    rings: Sequence[int] = ()
    """Steps at which the loss moved: circles."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small plot."""

    title: str
    """Above the panel."""
    lines: Sequence[Line]
    """Those drawn last lie on top."""
    logarithmic: bool = False
    limits: tuple[float, float]
    """Of the vertical axis."""


def draw(rows: Sequence[Sequence[Panel]], legend: str) -> str:
    """The picture: one row of panels for each of `rows`, and a line of legend above them."""
    columns = max(map(len, rows))
    width = LEFT + columns * (PANEL_WIDTH + GAP_X)
    height = TOP + len(rows) * (PANEL_HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18">{escape(legend)}</text>',
    ]
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            x, y = LEFT + column * (PANEL_WIDTH + GAP_X), TOP + row * (PANEL_HEIGHT + GAP_Y)
            parts.append(f'<g transform="translate({x} {y})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> str:
    steps = max((len(line.values) for line in panel.lines), default=1)
    low, high = (math.log10(v) if panel.logarithmic else v for v in panel.limits)

    def place(step: float, value: float) -> tuple[float, float]:
        shown = math.log10(max(value, 1e-30)) if panel.logarithmic else value
        # what leaves the panel runs along its edge
        up = min(max((shown - low) / (high - low), 0.0), 1.0)
        return (step - 1) / max(steps - 1, 1) * PANEL_WIDTH, PANEL_HEIGHT * (1 - up)

    parts = [
        f'<text y="-8" font-weight="bold">{escape(panel.title)}</text>',
        f'<rect width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="#bbb"/>',
    ]
    for value in _ticks(panel):
        y = place(1, value)[1]
        parts.append(f'<line x2="{PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{_label(value)}</text>')
    for step in (1, steps // 2, steps):
        x = place(step, 1)[0]
        parts.append(f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 14}" text-anchor="middle">{step}</text>')
    for line in panel.lines:
        parts += _line(line, place)
    return "".join(parts)


def _line(line: Line, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    # means of stretches: single steps would be a thick band, and megabytes of SVG
    every = max(math.ceil(len(line.values) / MOST_POINTS), 1)
    values = np.asarray(line.values, dtype=float)
    points = []
    for start in range(0, len(values), every):
        piece = values[start : start + every]
        if np.isfinite(piece).any():
            points.append(place(start + 1 + len(piece) / 2, float(np.nanmean(piece))))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1" opacity="0.75"/>']
    for step in line.marks:
        x, y = place(step, values[min(step, len(values)) - 1])
        parts.append(f'<path d="M{x:.1f} {y - 2:.1f}l5 -9h-10z" fill="#d99a00" stroke="#333" stroke-width=".5"/>')
    for step in line.rings:
        x, y = place(step, values[min(step, len(values)) - 1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" stroke="#b00020" stroke-width="1.6"/>')
    return parts


def _label(value: float) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"1e{exponent}" if abs(exponent) > 3 and math.isclose(value, 10.0**exponent) else f"{value:g}"


def _ticks(panel: Panel) -> list[float]:
    low, high = panel.limits
    if panel.logarithmic:
        first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
        every = max((last - first) // 4, 1)
        return [10.0**exponent for exponent in range(first, last + 1, every)]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
