"""How two checkpoints differ, at a terminal or in a text file."""

import math

from rich.console import Console
from rich.text import Text

from megachameleon.checkpoint.inspection.difference import EQUAL, Difference, TensorDifference
from megachameleon.checkpoint.inspection.naming import layer_and_kind
from megachameleon.checkpoint.inspection.norms import number, sparkline
from megachameleon.checkpoint.inspection.terminal import bar, plain_table, said
from megachameleon.console import printable

MOST_LAYERS_NAMED = 64


def print_difference(found: Difference, top: int, console: Console) -> None:
    """Settings, then tensors by distance, by kind and by layer."""
    for letter, report in (("A", found.one), ("B", found.other)):
        console.print(Text.assemble((f"{letter} ", "bold"), (str(report.path), "bold")))
        console.print(Text(f"  {printable(report.what)}; {report.weights['total']:,} parameters", style="dim"))
    _print_settings(found, console)
    names = "plain names, QK-norm by head" if found.by_plain_names else "the names in the files"
    counts = ", ".join(f"{count:,} {_status(status)}" for status, count in found.counts.items()) or "none"
    console.print(Text(f"\n{len(found.tensors):,} tensors by {names}: {counts}"))
    different = [tensor for tensor in found.tensors if tensor.status in ("different", "within tolerance")]
    if different:
        _print_largest(different, top, console)
        _print_by_kind(found, console)
        _print_by_layer(found, console)
    _print_others(found, top, console)
    verdict, style = ("equal", "bold green") if found.is_equal else ("different", "bold red")
    limit = f" (relative distance of a tensor up to {found.tolerance:g})" if found.tolerance else ""
    console.print(Text(f"\n{verdict}{limit}", style=style))


def _status(status: str) -> str:
    return {
        "equal": "equal to the bit",
        "same values": "of the same values in another dtype",
        "shape": "of another shape",
    }.get(status, status)


def _print_settings(found: Difference, console: Console) -> None:
    if not found.settings:
        console.print("\nsettings: no difference in what both say")
        return
    console.print()
    table = plain_table("setting", "A", "B", "")
    for setting in found.settings:
        note = "" if setting.counts else "not counted"
        table.add_row(setting.name, printable(said(setting.one)), printable(said(setting.other)), Text(note, "dim"))
    console.print(table)


def _print_largest(different: list[TensorDifference], top: int, console: Console) -> None:
    console.print()
    table = plain_table("tensor", ">relative distance", ">largest", ">cosine", "")
    table.columns[0].overflow, table.columns[0].no_wrap = "fold", False
    ordered = sorted(different, key=lambda tensor: -tensor.relative)
    for tensor in ordered[:top]:
        cosine = "" if math.isnan(tensor.cosine) else f"{tensor.cosine:.7f}"
        table.add_row(
            printable(tensor.name), number(tensor.relative), number(tensor.largest), cosine, printable(tensor.detail)
        )
    console.print(table)
    if len(ordered) > top:
        console.print(Text(f"{len(ordered) - top:,} more (--top)", style="dim"))


def _print_by_kind(found: Difference, console: Console) -> None:
    kinds: dict[str, dict[int | None, TensorDifference]] = {}
    for tensor in found.tensors:
        layer, kind = layer_and_kind(tensor.name)
        kinds.setdefault(kind, {})[layer] = tensor
    layers = sorted({layer for by_layer in kinds.values() for layer in by_layer if layer is not None})
    console.print()
    heading = f"layers {layers[0]} to {layers[-1]}" if layers else ""
    table = plain_table("by kind", ">different", ">of", ">most relative", heading)
    longest = max(map(len, kinds))
    room = max(console.width - min(longest, 30) - 40, 8)
    for kind, by_layer in kinds.items():
        apart = [tensor for tensor in by_layer.values() if tensor.status not in EQUAL]
        most = max(tensor.relative for tensor in by_layer.values())
        line = [by_layer[layer].relative if layer in by_layer else None for layer in layers]
        drawn = sparkline(line, room) if most and None not in by_layer else ""
        table.add_row(printable(kind), f"{len(apart):,}", f"{len(by_layer):,}", number(most), Text(drawn, style="cyan"))
    console.print(table)


def _print_by_layer(found: Difference, console: Console) -> None:
    """The distance of all tensors of a layer together, relative to their norm."""
    squares: dict[int, list[float]] = {}
    for tensor in found.tensors:
        layer, _ = layer_and_kind(tensor.name)
        if layer is not None and tensor.status in ("different", "within tolerance"):
            before = squares.setdefault(layer, [0.0, 0.0])
            squares[layer] = [before[0] + tensor.distance**2, before[1] + tensor.norm**2]
    relative = {layer: math.sqrt(d / n) if n else math.inf for layer, (d, n) in sorted(squares.items())}
    most = max((value for value in relative.values() if math.isfinite(value)), default=0.0)
    if not relative:
        return
    console.print()
    table = plain_table(">layer", ">relative distance of what differs", "")
    for layer, value in list(relative.items())[:MOST_LAYERS_NAMED]:
        share = value / most if most and math.isfinite(value) else 0.0
        table.add_row(str(layer), number(value), bar(share))
    console.print(table)


def _print_others(found: Difference, top: int, console: Console) -> None:
    """What could not be compared."""
    others = [tensor for tensor in found.tensors if tensor.status not in (*EQUAL, "different")]
    if others:
        console.print()
    for tensor in others[:top]:
        detail = f" ({tensor.detail})" if tensor.detail else ""
        console.print(Text(printable(f"{tensor.name}: {_status(tensor.status)}{detail}")), soft_wrap=True)
    if len(others) > top:
        console.print(Text(f"{len(others) - top:,} more (--top)", style="dim"))
    for letter, report in (("A", found.one), ("B", found.other)):
        for problem in report.problems:
            console.print(Text(f"problem: {letter}: {printable(problem)}", style="red"), soft_wrap=True)
