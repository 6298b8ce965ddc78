"""Step time and memory by part, drawn: one page without anything from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megachameleon.files import write_text
from megachameleon.planning.estimate import Estimate
from megachameleon.planning.report import PART_NAMES

WIDTH, BAR, GAP, LABEL, VALUE = 1100, 22, 12, 330, 90
"""Pixels: of the picture, of a bar's height, between bars, of labels before and values after them."""

COLOURS = {  # of parts of both pictures; "optimizer" and "head" are in both
    "matrices": "#2f6db3",
    "attention": "#5ba3d9",
    "passes": "#a9cfe8",
    "head": "#3f8f63",
    "tensor": "#e07b39",
    "context": "#b3541e",
    "bubble": "#c9c9c9",
    "transfers": "#8d6cab",
    "data": "#d6a419",
    "optimizer": "#7a7a7a",
    "other": "#444444",
    "weights": "#2f6db3",
    "gradients": "#e07b39",
    "activations": "#5ba3d9",
    "buffers": "#c9c9c9",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } p { color: #555; max-width: 62rem }
svg { max-width: 100%; height: auto } text { font: 13px system-ui, sans-serif }
.key { display: inline-block; margin-right: 1.2rem; white-space: nowrap }
.key i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px }"""


def write_picture(path: Path, title: str, found: Sequence[Estimate]) -> None:
    """Write the page; one bar for each layout."""
    times = [({name: 1e3 * s for name, s in one.time.parts().items()}, one.layout.describe()) for one in found]
    memory = [(one.memory_gib, one.layout.describe()) for one in found]
    usable = found[0].usable_gib if found else None
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1>"
        "<h2>A step, in milliseconds</h2><p>On the slowest pipeline stage. Of communication, what hides under nothing. "
        "Predicted, not measured.</p>"
        f"{_bars(times, PART_NAMES, None)}"
        "<h2>Memory of the fullest rank, in GiB</h2><p>The line is what is usable of a GPU.</p>"
        f"{_bars(memory, {}, usable)}</html>\n",
    )


def _bars(rows: Sequence[tuple[Mapping[str, float], str]], names: Mapping[str, str], limit: float | None) -> str:
    """A legend, and a stacked bar for each row of parts, all to one scale."""
    parts = [part for part in (rows[0][0] if rows else {}) if any(sizes[part] > 0 for sizes, _ in rows)]
    legend = "".join(
        f'<span class="key"><i style="background:{COLOURS[part]}"></i>{escape(names.get(part, part))}</span>'
        for part in parts
    )
    longest = max([sum(sizes.values()) for sizes, _ in rows] + [limit or 0.0])
    scale = (WIDTH - LABEL - VALUE) / longest if longest else 0.0
    height = len(rows) * (BAR + GAP) + GAP
    tops = [GAP + i * (BAR + GAP) for i in range(len(rows))]
    drawn = "".join(
        _bar(sizes, label, parts, names, top, scale) for (sizes, label), top in zip(rows, tops, strict=True)
    )
    if limit is not None:
        x = LABEL + limit * scale
        drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#b00" stroke-dasharray="5 3"/>'
    return f'<p>{legend}</p><svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">{drawn}</svg>'


def _bar(
    sizes: Mapping[str, float], label: str, parts: Sequence[str], names: Mapping[str, str], top: int, scale: float
) -> str:
    middle = top + BAR * 0.7
    drawn, x = [f'<text x="{LABEL - 10}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>'], float(LABEL)
    total = sum(sizes.values())
    for part in parts:
        width = sizes[part] * scale
        hint = f"{names.get(part, part)}: {_number(sizes[part])} ({100 * sizes[part] / total:.1f} %)"
        drawn.append(
            f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[part]}">'
            f"<title>{escape(hint)}</title></rect>"
        )
        if width > 45:  # pixels that a number needs
            drawn.append(
                f'<text x="{x + width / 2:.1f}" y="{middle:.1f}" text-anchor="middle" fill="{_ink(part)}">'
                f"{_number(sizes[part])}</text>"
            )
        x += width
    drawn.append(f'<text x="{x + 8:.1f}" y="{middle:.1f}">{_number(total)}</text>')
    return "".join(drawn)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ink(part: str) -> str:
    """Black on light colours, white on dark ones."""
    red, green, blue = (int(COLOURS[part][i : i + 2], 16) for i in (1, 3, 5))
    # Brightness as the eye has it: the weights are those of ITU-R BT.601.
    return "#222" if 0.3 * red + 0.59 * green + 0.11 * blue > 150 else "#fff"
