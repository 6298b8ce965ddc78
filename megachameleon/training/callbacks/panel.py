"""How a running training looks in a terminal."""

import math
from collections import deque
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(kw_only=True)
class PanelState:
    """What there is to show."""

    title: str
    step: int
    """Optimizer steps done."""
    num_steps: int
    """Of the whole run."""
    values: dict[str, float] = field(default_factory=dict)
    """Of the newest step, by the names of metrics.jsonl."""
    validation: str = ""
    """The newest losses, in one line; empty: none yet."""
    checkpoint: str = ""
    """The newest, and where it is; empty: none yet."""
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    """The newest ones."""


LOSSES = {"loss": "all", "loss_text": "text", "loss_image": "pictures", "log_z": "log Z"}
NORMS = {
    "output_norm": "output",
    "output_norm/text": "… text",
    "output_norm/image": "… pictures",
    "grad_norm": "gradient",
}
PARTS = ("data", "forward", "backward", "communication", "optimizer")


def panel(state: PanelState) -> RenderableType:
    """One frame: progress, numbers in columns, then what happened last."""
    values = state.values
    columns = Table.grid(padding=(0, 2), expand=True)
    for _ in range(4):
        columns.add_column()
    columns.add_row(
        _column("loss", {label: _number(values.get(name), ".4f") for name, label in LOSSES.items()}),
        _column("norm", {label: _number(values.get(name), ".3g") for name, label in NORMS.items()}),
        _column("speed", _speed(values)),
        _column("share of a step", _shares(values)),
    )
    rows: list[RenderableType] = [_progress(state), Text(), columns]
    happened = {"validation": state.validation, "checkpoint": state.checkpoint}
    rows += [Text.assemble((f"{name} ", "bold"), what) for name, what in happened.items() if what]
    rows += [Text(f"! {warning}", style="yellow", overflow="ellipsis", no_wrap=True) for warning in state.warnings]
    return Panel(Group(*rows), title=state.title, title_align="left", border_style="dim")


def duration(hours: float) -> str:
    """Such as 12 d 3 h, 3 h 20 min, 42 min, 7 s."""
    if not math.isfinite(hours):
        return "-"
    # Rounded once, here, so that no minute has 60 seconds.
    seconds = round(hours * 3600)
    days, rest = divmod(seconds, 86_400)
    if days:
        return f"{days} d {rest // 3600} h"
    if rest >= 3600:
        return f"{rest // 3600} h {rest % 3600 // 60} min"
    return f"{rest // 60} min" if rest >= 120 else f"{rest} s"


def _progress(state: PanelState) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    eta = state.values.get("eta_hours", math.nan)
    row.add_row(
        f"step [bold]{state.step:,}[/] of {state.num_steps:,}",
        ProgressBar(total=state.num_steps, completed=state.step),
        f"{100 * state.step / state.num_steps:.1f} %, ready in [bold]{duration(eta)}[/]",
    )
    return row


def _column(title: str, entries: dict[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for label, shown in entries.items():
        if shown:
            table.add_row(label, shown)
    return Group(Text(title, style="bold"), table)


def _speed(values: dict[str, float]) -> dict[str, str]:
    causal, full = values.get("mfu_causal"), values.get("mfu_full_attention")
    cost = values.get("cost")
    return {
        "tokens/s": _number(values.get("tokens_per_second"), ",.0f"),
        "MFU causal": "" if causal is None else f"{causal:.1%}",
        "MFU full": "" if full is None else f"{full:.1%}",
        "memory": "" if "memory_mb" not in values else f"{values['memory_mb'] / 1e3:.1f} GB",
        "GPU-hours": _number(values.get("gpu_hours"), ",.2f"),
        "cost": "" if cost is None else f"{cost:,.2f}",
        "effective": "" if "effective_time" not in values else f"{values['effective_time']:.1%}",
    }


def _shares(values: dict[str, float]) -> dict[str, str]:
    times = {part: values[f"time/{part}"] for part in PARTS if f"time/{part}" in values}
    whole = values.get("seconds", 0.0)
    return {part: f"{seconds / whole:.0%}" for part, seconds in times.items()} if whole else {}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "-" if math.isnan(value) else format(value, form)
