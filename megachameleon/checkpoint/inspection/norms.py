"""Norms of tensors by layer and kind, as tables and as bars of characters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from megachameleon.checkpoint.inspection.naming import layer_and_kind
from megachameleon.checkpoint.inspection.statistics import TensorNumbers
from megachameleon.checkpoint.inspection.terminal import bar, plain_table
from megachameleon.console import printable

HEIGHTS = "▁▂▃▄▅▆▇█"
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MOST_COLUMNS = 7
NUMBER_WIDTH = 8
LONGEST_HEADING = 10


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Euclidean norms, sorted."""

    by_kind: dict[str, dict[int, float]]
    """Of tensors in layers: kind, then layer."""
    outside: dict[str, float]
    """Of the others."""

    @property
    def layers(self) -> list[int]:
        """All, in order."""
        return sorted({layer for values in self.by_kind.values() for layer in values})

    def total(self, layer: int) -> float:
        """Of a whole layer."""
        return math.hypot(*(values[layer] for values in self.by_kind.values() if layer in values))


def sort_norms(numbers: Mapping[str, float]) -> Norms:
    """By layer and kind; parts of the same tensor are put together."""
    by_kind: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for name, norm in numbers.items():
        layer, kind = layer_and_kind(name)
        place = outside if layer is None else by_kind.setdefault(kind, {})
        key = kind if layer is None else layer
        # Parts of one tensor are orthogonal, so norms add as sides of a triangle do.
        place[key] = math.hypot(place.get(key, 0.0), norm)  # type: ignore[index, arg-type]
    return Norms(by_kind=by_kind, outside=outside)


def print_norms(norms: Norms, console: Console) -> None:
    """By kind with a line of bars over the layers, then by layer."""
    layers = norms.layers
    if layers:
        console.print(_by_kind(norms, layers, console.width))
        console.print(Text("bars: from at most half of the largest up to it", style="dim"))
        console.print()
        console.print(_by_layer(norms, layers, console.width))
    if norms.outside:
        console.print()
        table = plain_table("outside layers", ">norm")
        for name, norm in norms.outside.items():
            table.add_row(printable(name), number(norm))
        console.print(table)


def _by_kind(norms: Norms, layers: Sequence[int], width: int) -> object:
    table = plain_table("norm by kind", ">least", ">mean", ">most", f"layers {layers[0]} to {layers[-1]}")
    longest = max(len(kind) for kind in norms.by_kind)
    room = max(width - min(longest, 24) - 3 * (NUMBER_WIDTH + 2) - 4, 8)
    for kind, values in norms.by_kind.items():
        known = [values[layer] for layer in layers if layer in values]
        numbers = [number(value) for value in (min(known), sum(known) / len(known), max(known))]
        line = sparkline([values.get(layer) for layer in layers], room)
        table.add_row(printable(kind), *numbers, Text(line, style="cyan"))
    return table


def _by_layer(norms: Norms, layers: Sequence[int], width: int) -> object:
    kinds = [kind for kind in MATRICES if kind in norms.by_kind]
    kinds = kinds or sorted(norms.by_kind, key=lambda kind: -max(norms.by_kind[kind].values()))
    kinds = _fitting(kinds, width - 20)
    table = plain_table(">layer", *(f">{printable(_short(kind))}" for kind in kinds), ">all", "")
    most = max(norms.total(layer) for layer in layers)
    room = min(max(width - 8 - (NUMBER_WIDTH + 2) * (len(kinds) + 1), 4), 24)
    for layer in layers:
        total = norms.total(layer)
        cells = [number(norms.by_kind[kind][layer]) if layer in norms.by_kind[kind] else "" for kind in kinds]
        table.add_row(str(layer), *cells, number(total), bar(total / most if most else 0.0, room))
    return table


def _short(kind: str) -> str:
    last = kind.rpartition(".")[2]
    return last if len(last) <= LONGEST_HEADING else f"…{last[-LONGEST_HEADING + 1 :]}"


def _fitting(kinds: Sequence[str], width: int) -> list[str]:
    """As many as have room beside each other."""
    found: list[str] = []
    for kind in kinds[:MOST_COLUMNS]:
        width -= max(len(_short(kind)), NUMBER_WIDTH - 2) + 2
        if width < 0:
            break
        found.append(kind)
    return found


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A character for each value, or for the mean of several where they are more than `width`; a space for none."""
    per = max(math.ceil(len(values) / max(width, 1)), 1)
    groups = [[v for v in values[i : i + per] if v is not None] for i in range(0, len(values), per)]
    means = [sum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None and math.isfinite(mean)]
    if not known:
        return ""
    high = max(known)
    low = min(*known, high / 2)
    steps = len(HEIGHTS) - 1

    def character(mean: float | None) -> str:
        if mean is None:
            return " "
        if not math.isfinite(mean):
            return "!"
        return HEIGHTS[round(steps * (mean - low) / (high - low)) if high > low else 0]

    return "".join(map(character, means))


def print_statistics(numbers: Mapping[str, TensorNumbers], console: Console) -> None:
    """A line for each tensor."""
    table = plain_table("tensor", ">norm", ">least", ">most", ">mean", ">std", ">zeros", ">not finite")
    table.padding = (0, 1, 0, 0)
    table.columns[0].overflow, table.columns[0].no_wrap = "fold", False
    for name, found in numbers.items():
        cells = [number(value) for value in (found.norm, found.least, found.most, found.mean, found.std)]
        bad = Text(f"{found.not_finite:,}", style="red" if found.not_finite else "")
        table.add_row(printable(name), *cells, f"{found.zeros:,}", bad)
    console.print(table)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or not value else f"{value:.2g}"
