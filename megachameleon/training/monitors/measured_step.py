"""Turns the watch over forward passes on for training steps, and off for whatever else runs the model."""

from typing import TYPE_CHECKING

from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch

if TYPE_CHECKING:
    from megachameleon.training.step import TrainingState


class MeasuredStep(Monitor):
    """Stands before all monitors of one watch."""

    def __init__(self, watch: ForwardWatch) -> None:
        self.watch = watch

    def begin(self, step: int) -> None:
        """On."""
        self.watch.measuring = True

    def after_backward(self, state: "TrainingState") -> None:
        """Off."""
        self.watch.measuring = False
