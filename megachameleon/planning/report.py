"""What the planner says at the terminal."""

from rich.console import Console
from rich.table import Table

from megachameleon.planning.estimate import Estimate
from megachameleon.planning.search import Search

PART_NAMES = {
    "matrices": "matrix products",
    "attention": "attention",
    "passes": "norms, activations, residuals",
    "head": "head and loss",
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "bubble": "pipeline bubble",
    "transfers": "pipeline transfers",
    "data": "data-parallel communication",
    "optimizer": "optimizer",
    "other": "once a step",
}
"""Parts of `StepTime` in words; of communication, what hides under nothing."""


def print_estimate(found: Estimate, tokens: float | None, console: Console) -> None:
    """One layout: memory by part, step time by part, and what follows from them."""
    console.print(f"{found.cluster.name}, {found.layout.world_size:,} GPUs: {found.layout.describe()}\n")
    memory = Table("memory of the fullest rank", "GiB")
    memory.columns[1].justify = "right"
    for name, size in found.memory_gib.items():
        memory.add_row(name, f"{size:.2f}")
    memory.add_section()
    memory.add_row("all", f"{found.total_gib:.2f}")
    memory.add_row("usable", f"{found.usable_gib:.2f}")
    console.print(memory)
    time = Table("a step", "ms", "%")
    for column in time.columns[1:]:
        column.justify = "right"
    for name, seconds in found.time.parts().items():
        if seconds:
            time.add_row(PART_NAMES[name], f"{1e3 * seconds:,.1f}", f"{100 * seconds / found.time.total:.1f}")
    time.add_section()
    time.add_row("all", f"{1e3 * found.time.total:,.1f}", "100.0")
    console.print(time)
    for line in summary(found, tokens):
        console.print(line)


def summary(found: Estimate, tokens: float | None) -> list[str]:
    """Throughput, and what a run over `tokens` takes."""
    of_all = found.tokens_per_second * found.layout.world_size
    lines = [
        f"tokens/s a GPU   {found.tokens_per_second:,.0f}; all {of_all:,.0f}",
        f"mfu_causal       {found.mfu_causal:.1%} of {found.cluster.bf16_tflops:,.0f} TFLOP/s in bf16",
        f"mfu_full_attn    {found.mfu_full_attn:.1%}",
    ]
    if tokens:
        price = found.cluster.price_per_gpu_hour
        cost = f"; at {price:g} an hour {found.gpu_hours(tokens) * price:,.0f}" if price else ""
        lines.append(
            f"{tokens:.4g} tokens   {found.gpu_hours(tokens):,.0f} GPU-hours, {found.days(tokens):.1f} days{cost}"
        )
    return lines


def print_search(found: Search, top: int, tokens: float | None, console: Console) -> None:
    """The fastest layouts.

    Raises:
        ValueError: none fits; says by how much the smallest does not.
    """
    if not found.fitting:
        assert found.smallest is not None
        raise ValueError(f"no layout of {found.tried:,} fits; the one that needs least {found.smallest.why_not()}")
    console.print(f"{found.tried:,} layouts tried, {found.num_fitting:,} fit; the fastest of each kind:\n")
    table = Table()
    table.add_column("layout", no_wrap=True)
    for name in ("GiB", "ms a step", "tokens/s a GPU", "mfu_causal", "bubble", "tensor", "data"):
        table.add_column(name, justify="right")
    if tokens:
        table.add_column("days", justify="right")
    for one in found.fitting[:top]:
        shares = [100 * getattr(one.time, name) / one.time.total for name in ("bubble", "tensor", "data")]
        row = [
            one.layout.describe(),
            f"{one.total_gib:.1f}",
            f"{1e3 * one.time.total:,.0f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.mfu_causal:.1%}",
            *(f"{share:.1f} %" for share in shares),
        ]
        table.add_row(*row, *([f"{one.days(tokens):.1f}"] if tokens else []))
    console.print(table)
    console.print("bubble, tensor, data: shares of the step that hide under nothing")
