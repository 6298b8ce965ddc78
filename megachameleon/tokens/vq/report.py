"""What a training leaves for people: pictures beside their reconstructions, curves, and a page with both."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megachameleon.files import atomic_path, write_text

METRICS_FILE = "metrics.jsonl"
"""A JSON object for each logged step."""
RECONSTRUCTIONS_FILE = "reconstructions.png"
PAGE_FILE = "report.html"
PICTURES_FOLDER = "pictures"
SHEET_PIXELS = 1024
"""Largest width of a sheet of pictures, unless one picture is wider."""
BORDER = 2
"""White pixels around each picture of a sheet."""
CURVES = ("psnr", "loss", "perceptual", "gan", "gan_weight", "discriminator", "psnr_held_out", "perplexity")
WIDTH, HEIGHT = 360, 120
"""Of a curve, in pixels."""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:40px auto;padding:0 20px;color:#222}
img{max-width:100%;image-rendering:auto}table{border-collapse:collapse}td{padding:2px 18px 2px 0}
figure{display:inline-block;margin:0 16px 16px 0}figcaption{font-size:13px;color:#666}svg{background:#f6f6f4}"""


def sheet_columns(size: int) -> int:
    """How many pictures of this side stand side by side on a sheet."""
    return max(1, min(12, SHEET_PIXELS // (size + 2 * BORDER)))


def draw_pairs(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """A PNG of originals uint8 [B, 3, S, S], each row with its reconstructions below it."""
    columns = min(len(originals), sheet_columns(originals.shape[-1]))
    edge = ((0, 0), (BORDER, BORDER), (BORDER, BORDER))
    strips = []
    # whole rows only, since strips are joined and must be of one width
    for start in range(0, len(originals) - len(originals) % columns, columns):
        for pictures in (originals, reconstructions):
            strip = [
                np.pad(picture.numpy(), edge, constant_values=255) for picture in pictures[start : start + columns]
            ]
            strips.append(np.concatenate(strip, 2))
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(strips, 1).transpose(1, 2, 0)).save(temporary, "PNG")


def write_page(folder: Path, report: dict[str, Any], missing: Sequence[str]) -> None:
    """`report.html`: figures, what was not measured and why, curves, pictures."""
    entries = _entries(folder / METRICS_FILE)
    facts = "".join(f"<tr><td>{html.escape(name)}</td><td>{_shown(value)}</td></tr>" for name, value in report.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in missing)
    curves = "".join(_curve(entries, name) for name in CURVES)
    steps = sorted((folder / PICTURES_FOLDER).glob("step-*.png"))
    drawn = "".join(
        f'<figure><img src="{PICTURES_FOLDER}/{path.name}" loading="lazy"><figcaption>{path.stem}</figcaption></figure>'
        for path in steps
    )
    write_text(
        folder / PAGE_FILE,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Image tokenizer</title><style>{STYLE}</style>'
        f"<h1>Image tokenizer</h1><table>{facts}</table>"
        + (f"<h2>Not measured</h2><ul>{notes}</ul>" if notes else "")
        + f"<h2>Held-out pictures, and below each row their reconstructions</h2>"
        f'<img src="{RECONSTRUCTIONS_FILE}" alt="originals and reconstructions"><h2>Curves</h2>{curves}'
        + (f"<h2>On the way</h2>{drawn}" if drawn else "")
        + "</html>\n",
    )


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # a line without its end is one that a kill has cut
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _curve(entries: Sequence[dict[str, Any]], name: str) -> str:
    points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
    if len(points) < 2:
        return ""
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    across, up = WIDTH / max(last - first, 1), HEIGHT / max(high - low, 1e-12)
    line = " ".join(f"{(step - first) * across:.1f},{(high - value) * up:.1f}" for step, value in points)
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}" fill="none" stroke="#2a6f4e" '
        f'stroke-width="1.5"/></svg><figcaption>{name}: {low:.4g} to {high:.4g}, '
        f"steps {first} to {last}</figcaption></figure>"
    )


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else html.escape("not measured" if value is None else str(value))
