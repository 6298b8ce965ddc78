"""Chameleon's own runs: what the planner says of them, beside what was reported, and what it recommends today."""

from dataclasses import dataclass, replace

from megachameleon.config import RunConfig, load_config
from megachameleon.planning.estimate import Estimate, estimate_run
from megachameleon.planning.hardware import CLUSTERS
from megachameleon.planning.search import search

TOKENS = 9.2e12
"""That each model was trained on (arXiv 2405.09818, table 1 and section 2.3: 2.1 epochs of 4.4T)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """A run of arXiv 2405.09818, table 2."""

    preset: str
    """Of our configurations."""
    gpus: int
    """A100 of 80 GB."""
    gpu_hours: int
    tensor_parallel: int
    """Assumed, as is the rest of the layout. Four ranks for the 34B: its QK-norm has four groups, one for each
    model-parallel rank that it was trained with."""


RUNS = (
    Reported(preset="chameleon_7b", gpus=1024, gpu_hours=856_481, tensor_parallel=1),
    Reported(preset="chameleon_34b", gpus=3072, gpu_hours=4_282_407, tensor_parallel=4),
)
TODAY = (("chameleon_7b", 256), ("chameleon_34b", 1024))
"""Presets and numbers of H100 for which layouts are recommended."""


def paper_tables() -> list[str]:
    """Markdown: the paper's runs, and recommendations."""
    lines = [
        f"{TOKENS / 1e12:g} T tokens on A100 80GB:",
        "",
        "| run | layout | fits | GiB | tokens/s a GPU | mfu_causal | GPU-hours | days | reported GPU-hours | "
        "reported / planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        for one in paper_estimates(run):
            hours = one.gpu_hours(TOKENS)
            cells = (
                f"{run.preset}, {run.gpus:,} GPUs",
                one.layout.describe(),
                "yes" if one.fits else "no",
                f"{one.total_gib:.1f}",
                f"{one.tokens_per_second:,.0f}",
                f"{one.mfu_causal:.1%}",
                f"{hours:,.0f}",
                f"{one.days(TOKENS):.1f}",
                f"{run.gpu_hours:,}",
                f"{run.gpu_hours / hours:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *recommendations()]


def paper_estimates(run: Reported) -> list[Estimate]:
    """The assumed layout without recomputation and with all of it."""
    config = load_config(run.preset)
    parallel = replace(
        config.parallel,
        tensor_parallel=run.tensor_parallel,
        pipeline_parallel=1,
        sequence_parallel=run.tensor_parallel > 1,
    )
    return [
        estimate_run(replace(config, parallel=replace(parallel, recompute=how)), run.gpus, CLUSTERS["a100"])
        for how in ("none", "full")
    ]


def recommendations(top: int = 3) -> list[str]:
    """Markdown: the fastest layouts on H100."""
    lines = [
        f"{TOKENS / 1e12:g} T tokens on H100 80GB, the fastest layouts that fit:",
        "",
        "| run | layout | GiB | ms a step | tokens/s a GPU | mfu_causal | GPU-hours | days |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset, gpus in TODAY:
        config: RunConfig = load_config(preset)
        for one in search(config, gpus, CLUSTERS["h100"]).fitting[:top]:
            cells = (
                f"{preset}, {gpus:,} GPUs",
                one.layout.describe(),
                f"{one.total_gib:.1f}",
                f"{1e3 * one.time.total:,.0f}",
                f"{one.tokens_per_second:,.0f}",
                f"{one.mfu_causal:.1%}",
                f"{one.gpu_hours(TOKENS):,.0f}",
                f"{one.days(TOKENS):.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines
