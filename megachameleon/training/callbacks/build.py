"""Which callbacks a configuration asks for."""

from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.callbacks.drawing import Drawing
from megachameleon.training.callbacks.metrics_file import MetricsFile
from megachameleon.training.callbacks.tensorboard import TensorBoard
from megachameleon.training.callbacks.terminal import Terminal


def build_callbacks(config: RunConfig) -> list[Callback]:
    """In the order in which they hear of events."""
    folder = Path(config.output_dir)
    callbacks: list[Callback] = [MetricsFile(folder), Terminal()]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(folder))
    if config.logging.drawing.prompts:
        callbacks.append(Drawing(config))
    return callbacks
