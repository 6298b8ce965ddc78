"""How much of what a maker states is reached: few physical constants, in one place.

Those of `FITTED` come from `python tools/plan.py --fit`; the others were set beforehand from the sources named.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiencies:
    """Fractions of peak rates, but where a unit is given."""

    gemm_ampere: float
    """Matrix products too large for anything but arithmetic to count."""
    gemm_hopper: float
    """The same in bf16 on Hopper."""
    gemm_hopper_fp8: float
    """Hopper's two also stand for Blackwell, for want of measurements in bf16."""
    gemm_traffic: float
    """Share of a matrix product's memory traffic that does not run under its arithmetic."""
    memory: float
    """Bandwidth of passes over memory."""
    nvlink: float
    """Bandwidth of collectives within a node."""
    overlapped_tensor: float
    """Share of tensor-parallel communication that is hidden where it is overlapped on purpose."""
    # Set by hand before the first fit, like the three below it; fits leave them as they are.
    network: float = 0.80
    """Bandwidth of collectives and transfers between nodes."""
    launch_seconds: float = 5e-6
    """From one kernel to the next."""
    message_seconds: float = 20e-6
    """Latency of a collective or transfer."""
    step_seconds: float = 0.02
    """What is done once a step and hides under nothing: reading losses, the gradient norm, the next batch."""


FITTED = Efficiencies(
    gemm_ampere=0.808,
    gemm_hopper=0.585,
    gemm_hopper_fp8=0.584,
    gemm_traffic=0.618,
    memory=0.627,
    nvlink=0.632,
    overlapped_tensor=0.761,
)
"""Fitted to all `published.points()`; errors are told with constants fitted to the other half of them."""
