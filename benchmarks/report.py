"""Timings as numbers to keep and a table to read."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Spread, Timing, by_round, ratios
from benchmarks.shapes import Shape

GIB = 2**30


def open_console(*, width: int = 120) -> Console:
    """A console for tables: as wide as its terminal, `width` columns where it is none."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant."""

    name: str
    title: str
    wall_seconds: Spread
    """A step."""
    cpu_seconds: Spread
    """Of all threads of the process, a step."""
    wall_ratio: Spread
    """Its time over ours, paired by round: above 1 we are faster."""
    cpu_ratio: Spread
    tokens_per_second: float
    """By the median wall time; padding counts."""
    first_loss: float
    """Nats per token; NaN where it was not computed."""
    peak_bytes: int | None
    """Own memory; None where it was not measured."""
    mfu_causal: float | None
    """FLOPs over the device's peak, with the visible half of attention; None without a known peak."""
    mfu_full_attn: float | None
    """The same with all of attention."""


def make_row(
    name: str,
    title: str,
    timings: Sequence[Timing],
    reference: str,
    shape: Shape,
    *,
    first_loss: float,
    peak_flops: float | None,
    peak_bytes: int | None,
) -> Row:
    """Summarise one contestant.

    Args:
        reference: name of the contestant that ratios are against.
        peak_flops: of the device, or None.
        peak_bytes: measured elsewhere; a GPU's figures stand in the timings.
    """
    wall = Spread.of(by_round(timings, name, _wall))
    on_device = [timing.peak_bytes for timing in timings if timing.contestant == name and timing.peak_bytes is not None]
    speed = shape.tokens / wall.median

    def mfu(causal: bool) -> float | None:
        return None if peak_flops is None else speed * shape.flops_per_token(causal=causal) / peak_flops

    return Row(
        name=name,
        title=title,
        wall_seconds=wall,
        cpu_seconds=Spread.of(by_round(timings, name, _cpu)),
        wall_ratio=Spread.of(list(ratios(timings, name, reference, _wall))),
        cpu_ratio=Spread.of(list(ratios(timings, name, reference, _cpu))),
        tokens_per_second=speed,
        first_loss=first_loss,
        peak_bytes=max(on_device, default=peak_bytes),
        mfu_causal=mfu(True),
        mfu_full_attn=mfu(False),
    )


def as_json(rows: Sequence[Row], timings: Sequence[Timing]) -> dict[str, Any]:
    """Summaries and every sample."""
    return {
        "contestants": {row.name: {key: v for key, v in asdict(row).items() if key != "name"} for row in rows},
        "samples": [asdict(timing) for timing in timings],
    }


def print_report(rows: Sequence[Row], reference: str, console: Console) -> None:
    """The table, and what each contestant is."""
    table = Table(
        box=box.SIMPLE_HEAD, caption=f"ratio: time over that of {reference}, paired by round; in brackets, quartiles"
    )
    table.add_column("")
    lines = [_cells(row) for row in rows]
    # columns that nobody fills, such as MFU on a CPU, are left out
    shown = [heading for heading in lines[0] if any(line[heading] for line in lines)]
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(row.name, *(line[heading] for heading in shown))
    console.print(table)
    for row in rows:
        loss = "" if math.isnan(row.first_loss) else f"; first loss {row.first_loss:.5f}"
        console.print(f"{row.name}: {row.title}{loss}", highlight=False, soft_wrap=True)


def _cells(row: Row) -> dict[str, str]:
    wall = row.wall_seconds
    return {
        "ms / step": f"{1e3 * wall.median:,.1f} [{1e3 * wall.low_quartile:,.1f} {1e3 * wall.high_quartile:,.1f}]",
        "ratio": _ratio(row.wall_ratio),
        "CPU ms": f"{1e3 * row.cpu_seconds.median:,.1f}",
        "CPU ratio": _ratio(row.cpu_ratio),
        "tokens/s": f"{row.tokens_per_second:,.0f}",
        "GiB": "" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}",
        "MFU causal": _percent(row.mfu_causal),
        "MFU full": _percent(row.mfu_full_attn),
    }


def _wall(timing: Timing) -> float:
    return timing.wall_seconds


def _cpu(timing: Timing) -> float:
    return timing.cpu_seconds


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low_quartile:.3f} {spread.high_quartile:.3f}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
