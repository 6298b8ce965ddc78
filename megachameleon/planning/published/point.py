"""One measurement that others published, with what is known of its layout."""

from dataclasses import dataclass
from typing import Literal

from megachameleon.planning.flops import Convention, flops_of
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import Software


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One published measurement."""

    family: str
    """Points of one source and hardware; errors are told by it."""
    name: str
    """Of the run within its family."""
    source: str
    """Document, and where in it."""
    cluster: str
    """Name in `hardware.CLUSTERS`."""
    shape: TransformerShape
    layout: Layout
    software: Software
    """What the trainer overlaps and fuses."""
    measured: float
    """In `unit`."""
    unit: Literal["teraflops", "seconds", "tokens"]
    """TFLOP/s of a GPU by `convention`, seconds of a step, or tokens a second of a GPU."""
    convention: Convention
    """Which work the source counts."""
    assumed: str = ""
    """Facts that the source does not state."""

    def teraflops(self, seconds: float) -> float:
        """TFLOP/s of each GPU in a step of so many seconds, in the source's definition."""
        tokens = self.layout.global_batch_size * self.shape.sequence_length
        return flops_of(self.shape).total(self.convention) * tokens / seconds / self.layout.world_size / 1e12

    @property
    def seconds(self) -> float:
        """Of a step, as measured."""
        if self.unit == "seconds":
            return self.measured
        if self.unit == "tokens":
            tokens = self.layout.global_batch_size * self.shape.sequence_length
            return tokens / self.measured / self.layout.world_size
        return self.teraflops(self.measured)  # teraflops x seconds is the same product, so the function is its inverse
