"""Which monitors a configuration asks for."""

from typing import TYPE_CHECKING

from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch
from megachameleon.training.monitors.measured_step import MeasuredStep
from megachameleon.training.monitors.norms import block_norms, output_norm

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


def build_monitors(trainer: "Trainer") -> list[Monitor]:
    """Monitors of a built model, attached to this rank's part of it."""
    config = trainer.config
    watch = ForwardWatch(trainer.state.model, trainer.context)
    layers, every = config.model.num_layers, config.logging.monitor_every
    makers = {
        "output_norm": lambda: output_norm(watch, layers),
        "block_norms": lambda: block_norms(watch, layers, every),
    }
    monitors = [makers[name]() for name in config.logging.monitors]
    return [MeasuredStep(watch), *monitors] if monitors else []
