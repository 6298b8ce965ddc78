"""Scalars and drawn pictures to Weights & Biases."""

import secrets
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachameleon.config.binding import unbind
from megachameleon.config.logging import WandbConfig
from megachameleon.training.callbacks.courier import Courier
from megachameleon.training.callbacks.scalar_log import ScalarLog
from megachameleon.training.callbacks.throughput import Throughput

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class WeightsAndBiases(ScalarLog):
    """A resumed run goes on in the same W&B run, whose id is kept in checkpoints. Steps done again are drawn again."""

    name = "wandb"

    def __init__(self, throughput: Throughput, config: WandbConfig, folder: Path) -> None:
        """
        Raises:
            ValueError: the package is not installed.
        """
        super().__init__(throughput)
        if find_spec("wandb") is None:
            raise ValueError(
                "logging.wandb: the package is not installed; pip install wandb, or take logging.wandb out"
            )
        self.config, self.folder = config, folder
        self.run_id = secrets.token_hex(8)
        self._courier: Courier | None = None
        self._run: Any = None

    def open(self, trainer: "Trainer") -> None:
        """Start or resume the run, in the background."""
        # In a thread: wandb.init waits for the network.
        self._courier = Courier("Weights & Biases")
        settings = unbind(trainer.config)
        self._courier.send(lambda: self._init(settings))

    def log(self, values: dict[str, float], step: int) -> None:
        """With the step as an axis of its own: W&B's own counter refuses steps that are done again."""
        self._send(lambda: self._run.log({**values, "step": step}))

    def log_pictures(self, prompts: Sequence[str], pictures: Sequence[Any], step: int) -> None:
        """Pictures with their prompts."""

        def send() -> None:
            wandb = import_module("wandb")
            images = [wandb.Image(picture, caption=prompt) for prompt, picture in zip(prompts, pictures, strict=True)]
            self._run.log({"drawn": images, "step": step})

        self._send(send)

    def close(self) -> None:
        """Finish the run."""
        if self._courier is not None:
            self._send(self._finish)
            self._courier.close()

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that run."""
        self.run_id = state["run_id"]

    def _init(self, settings: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity or None,
            name=self.config.name or self.folder.name,
            id=self.run_id,
            resume="allow",  # begins the run, or goes on in it if W&B knows the id
            mode=self.config.mode,
            dir=str(self.folder),
            config=settings,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _finish(self) -> None:
        self._run.finish()

    def _send(self, call: Callable[[], None]) -> None:
        assert self._courier is not None
        self._courier.send(lambda: call() if self._run is not None else None)  # without a run it has been said why
