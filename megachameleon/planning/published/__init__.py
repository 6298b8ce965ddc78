"""Step times that others measured and published, with every fact about their layouts, and which facts we assumed."""

from megachameleon.planning.published.bf16 import bf16_points
from megachameleon.planning.published.foundry import foundry_points
from megachameleon.planning.published.fp8 import blackwell_points, fp8_points
from megachameleon.planning.published.point import Point

__all__ = ["Point", "points", "unfitted"]


def points() -> list[Point]:
    """Those that constants are fitted to and checked on, in a fixed order."""
    return [*bf16_points(), *fp8_points()]


def unfitted() -> list[Point]:
    """Those that no constant was ever fitted to: another GPU generation, and another trainer."""
    return [*blackwell_points(), *foundry_points()]
