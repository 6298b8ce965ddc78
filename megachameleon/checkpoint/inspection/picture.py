"""Norms by layer and kind of tensor, drawn: an SVG picture, or a PNG of it."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megachameleon.checkpoint.inspection.naming import PARTS, part_of
from megachameleon.checkpoint.inspection.norms import number, sort_norms
from megachameleon.console import printable
from megachameleon.files import atomic_path, write_text

PANEL_WIDTH, PANEL_HEIGHT = 430, 230
LEFT, TOP, LABELS, GAP = 60, 74, 145, 60
"""Before the first panel and above it, behind a panel for the names of its lines, and between rows."""
COLUMNS = 2
COLOURS = ("#2f6db3", "#e07b39", "#3f8f63", "#8d6cab", "#b3541e", "#5ba3d9", "#7a7a7a", "#d6a419")
LABEL_HEIGHT = 13
PNG_SCALE = 2

Lines = Mapping[str, Mapping[int, float]]
"""Norms by kind and layer."""


def write_picture(path: Path, title: str, norms: Mapping[str, float]) -> None:
    """Draw a panel for each part of the model, with a line for each kind of tensor over the layers.

    Args:
        path: ends in `.svg` or `.png`.
        norms: by name of the tensor.

    Raises:
        ValueError: no tensor is in a layer, or the file cannot be written.
    """
    found = sort_norms(norms)
    panels: dict[str, dict[str, dict[int, float]]] = {part: {} for part in PARTS}
    for kind, values in found.by_kind.items():
        panels[part_of(f"layers.0.{kind}")][kind] = values
    panels = {part: kinds for part, kinds in panels.items() if kinds}
    if not panels:
        raise ValueError(f"--picture {path}: no tensor of this checkpoint is in a layer, so there is nothing to plot")
    outside = " · ".join(f"{printable(name)} {number(norm)}" for name, norm in found.outside.items())
    svg = _page(title, panels, outside)
    if path.suffix == ".svg":
        write_text(path, svg)
        return
    import resvg_py

    with atomic_path(path) as temporary:
        temporary.write_bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", zoom=PNG_SCALE))


def _page(title: str, panels: Mapping[str, Lines], outside: str) -> str:
    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(len(panels), COLUMNS)
    width = LEFT + columns * (PANEL_WIDTH + LABELS) + (columns - 1) * LEFT
    height = TOP + rows * (PANEL_HEIGHT + GAP) + 20
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(printable(title))}</text>',
        f'<text x="{LEFT}" y="43" fill="#666">Euclidean norm of each tensor by layer</text>',
    ]
    for i, (name, lines) in enumerate(panels.items()):
        x = LEFT + i % COLUMNS * (PANEL_WIDTH + LABELS + LEFT)
        y = TOP + i // COLUMNS * (PANEL_HEIGHT + GAP)
        drawn.append(f'<g transform="translate({x} {y})">{_panel(name, lines)}</g>')
    if outside:
        drawn.append(f'<text x="{LEFT}" y="{height - 14}" fill="#666">outside layers: {escape(outside)}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _panel(name: str, lines: Lines) -> str:
    layers = sorted({layer for values in lines.values() for layer in values})
    values = [value for line in lines.values() for value in line.values() if math.isfinite(value)]
    high = max(values, default=0.0) or 1.0
    step = _step(high)
    top = math.ceil(high / step) * step

    def place(layer: int, value: float) -> tuple[float, float]:
        across = (layer - layers[0]) / max(layers[-1] - layers[0], 1)
        return across * PANEL_WIDTH, PANEL_HEIGHT * (1 - min(value, top) / top)

    drawn = [f'<text y="-10" font-weight="bold">{escape(name)}</text>']
    for i in range(round(top / step) + 1):
        y = place(layers[0], i * step)[1]
        drawn.append(f'<line x2="{PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e6e6"/>')
        drawn.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{number(i * step)}</text>')
    every = max(math.ceil(len(layers) / 8), 1)
    for layer in layers[::every]:
        x = place(layer, 0)[0]
        drawn.append(f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 18}" text-anchor="middle">{layer}</text>')
    ends = {kind: place(max(line), line[max(line)])[1] for kind, line in lines.items()}
    labels = _apart(ends)
    for i, (kind, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        drawn += _line(kind, [place(layer, line[layer]) for layer in sorted(line)], colour, labels[kind])
    return "".join(drawn)


def _line(kind: str, points: Sequence[tuple[float, float]], colour: str, label: float) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points if math.isfinite(y))
    name = escape(printable(kind if len(kind) <= 18 else f"…{kind[-17:]}"))
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"><title>{name}</title></polyline>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in points if math.isfinite(y)),
        f'<text x="{PANEL_WIDTH + 10}" y="{label + 4:.1f}" fill="{colour}">{name}</text>',
    ]


def _apart(ends: Mapping[str, float]) -> dict[str, float]:
    """Heights of labels beside the ends of their lines, none over another."""
    placed: dict[str, float] = {}
    last = -math.inf
    for kind, y in sorted(ends.items(), key=lambda item: item[1]):
        last = max(y, last + LABEL_HEIGHT)
        placed[kind] = last
    limit = float(PANEL_HEIGHT)  # those that are pushed below the panel push others up again
    for kind, y in sorted(placed.items(), key=lambda item: -item[1]):
        placed[kind] = min(y, limit)
        limit = placed[kind] - LABEL_HEIGHT
    return placed


def _step(high: float) -> float:
    """A round number of which four to nine make the axis."""
    power = 10.0 ** math.floor(math.log10(high / 4))
    return max(m * power for m in (1, 2, 5) if m * power <= high / 4) if high >= 4 * power else power
