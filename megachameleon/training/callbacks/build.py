"""Which callbacks a configuration asks for."""

from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.callbacks.drawing import Drawing
from megachameleon.training.callbacks.metrics_file import MetricsFile
from megachameleon.training.callbacks.mlflow import MLflow
from megachameleon.training.callbacks.tensorboard import TensorBoard
from megachameleon.training.callbacks.terminal import Terminal
from megachameleon.training.callbacks.throughput import Throughput
from megachameleon.training.callbacks.wandb import WeightsAndBiases


def build_callbacks(config: RunConfig) -> list[Callback]:
    """In the order in which they hear of events.

    Raises:
        ValueError: a service is configured whose package is not installed, or drawings cannot be made.
    """
    folder, logging = Path(config.output_dir), config.logging
    # First in the list: the others show the values that it fills.
    throughput = Throughput()
    callbacks: list[Callback] = [throughput, MetricsFile(throughput, folder), Terminal(throughput)]
    if logging.tensorboard:
        callbacks.append(TensorBoard(throughput, folder))
    if logging.wandb is not None:
        callbacks.append(WeightsAndBiases(throughput, logging.wandb, folder))
    if logging.mlflow is not None:
        callbacks.append(MLflow(throughput, logging.mlflow, folder))
    if logging.drawing.prompts:
        callbacks.append(Drawing(config))
    return callbacks
