"""Scalars and drawn pictures to MLflow."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.config.binding import unbind
from megachameleon.config.logging import MlflowConfig
from megachameleon.training.callbacks.courier import Courier
from megachameleon.training.callbacks.scalar_log import ScalarLog
from megachameleon.training.callbacks.throughput import Throughput

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class MLflow(ScalarLog):
    """A resumed run goes on in the same MLflow run, whose id is kept in checkpoints."""

    name = "mlflow"

    def __init__(self, throughput: Throughput, config: MlflowConfig, folder: Path) -> None:
        """
        Raises:
            ValueError: the package is not installed.
        """
        super().__init__(throughput)
        if find_spec("mlflow") is None:
            raise ValueError(
                "logging.mlflow: the package is not installed; pip install mlflow-skinny, or take logging.mlflow out"
            )
        self.config, self.folder = config, folder
        self.run_id: str | None = None
        """None until the server has given one."""
        self._courier: Courier | None = None
        self._client: Any = None

    def open(self, trainer: "Trainer") -> None:
        """Start or resume the run, in the background."""
        # In a thread: MLflow's client tries again for minutes when its server is away.
        self._courier = Courier("MLflow")
        settings = unbind(trainer.config)
        self._courier.send(lambda: self._init(settings))

    def log(self, values: dict[str, float], step: int) -> None:
        """In one message."""
        now = int(time.time() * 1000)

        def send() -> None:
            metric = import_module("mlflow.entities").Metric
            metrics = [metric(name, float(value), now, step) for name, value in values.items()]
            for start in range(0, len(metrics), 1000):  # the most that the server takes
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

        self._send(send)

    def log_pictures(self, prompts: Sequence[str], pictures: Sequence[Any], step: int) -> None:
        """As artifacts `drawn/step_<step>/<number>.png`, with the prompts beside them."""

        def send() -> None:
            folder = f"drawn/step_{step:08d}"
            for number, picture in enumerate(pictures):
                self._client.log_image(self.run_id, picture, f"{folder}/{number:02d}.png")
            self._client.log_dict(self.run_id, list(prompts), f"{folder}/prompts.json")

        self._send(send)

    def close(self) -> None:
        """Finish the run."""
        if self._courier is not None:
            self._send(lambda: self._client.set_terminated(self.run_id))
            self._courier.close()

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that run."""
        self.run_id = state["run_id"] or self.run_id  # saved before the server had answered, in a roll-back

    def _init(self, settings: dict[str, Any]) -> None:
        client = import_module("mlflow").MlflowClient(tracking_uri=self.config.tracking_uri)
        if self.run_id is None:
            found = client.get_experiment_by_name(self.config.experiment)
            experiment = found.experiment_id if found else client.create_experiment(self.config.experiment)
            run = client.create_run(experiment, run_name=self.config.name or self.folder.name)
            self.run_id = run.info.run_id
            client.log_dict(self.run_id, settings, "config.json")
        else:
            # An earlier life has marked it as ended.
            client.update_run(self.run_id, status="RUNNING")
        self._client = client

    def _send(self, call: Callable[[], None]) -> None:
        assert self._courier is not None
        self._courier.send(lambda: call() if self._client is not None else None)  # without one it has been said why
