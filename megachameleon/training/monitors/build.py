"""Which monitors a configuration asks for."""

from typing import TYPE_CHECKING

from megachameleon.training.monitors.base import Monitor

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


def build_monitors(trainer: "Trainer") -> list[Monitor]:
    """Monitors of a built model, attached to this rank's part of it."""
    return []
