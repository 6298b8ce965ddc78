"""What there is to say about a step, by name, for all who write it down."""

import math
from dataclasses import asdict

from megachameleon.training.callbacks.base import StepEvent
from megachameleon.training.callbacks.throughput import Throughput

SPEED = (
    *("seconds", "tokens_per_second", "memory_mb", "mfu_causal", "mfu_full_attention"),
    *("eta_hours", "gpu_hours", "cost", "effective_time"),
)


def step_values(event: StepEvent, throughput: Throughput) -> dict[str, float]:
    """All numbers of a step."""
    return {
        **asdict(event.report.losses),
        "grad_norm": event.report.grad_norm,
        "lr": event.report.lr,
        "tokens": event.tokens,
        "seconds": round(event.seconds, 4),
        "tokens_per_second": round(event.tokens_per_second, 1),
        "memory_mb": round(event.memory_bytes / 1e6, 1),
        **throughput.values,
        **event.report.monitors,
    }


def grouped(values: dict[str, float]) -> dict[str, float]:
    """Names with a group before a stroke, as TensorBoard and its like show them; what is not finite is left out."""
    groups = {name.partition("/")[0] for name in values if "/" in name}
    return {_with_group(name, groups): value for name, value in values.items() if math.isfinite(value)}


def _with_group(name: str, groups: set[str]) -> str:
    if "/" in name:
        return name
    if name in groups:  # the whole, beside its parts
        return f"{name}/all"
    return f"speed/{name}" if name in SPEED else f"train/{name}"
