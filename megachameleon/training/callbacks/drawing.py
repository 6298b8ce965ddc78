"""Pictures that the model draws at every validation: on disk, and in TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megachameleon.checkpoint.folder import checkpoint_name
from megachameleon.config import RunConfig
from megachameleon.files import write_json
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.callbacks.tensorboard import TENSORBOARD_FOLDER
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer

SAMPLES_FOLDER = "samples"
PROMPTS_FILE = "prompts.json"


class Drawing(Callback):
    """Draws the prompts of `logging.drawing` into `samples/step_*/NN.png`; all ranks take part."""

    def __init__(self, config: RunConfig) -> None:
        """
        Raises:
            ValueError: the image tokenizer is not named, is missing, or has other codes than the vocabulary.
        """
        from megachameleon.tokens.text import TextTokenizer
        from megachameleon.tokens.vq import ImageTokenizer

        if config.data.image_tokenizer is None:
            raise ValueError("data.image_tokenizer: missing; logging.drawing.prompts needs it to show pictures")
        self.text_tokenizer = TextTokenizer.load(Path(config.data.tokenizer))
        self.image_tokenizer = ImageTokenizer.load(Path(config.data.image_tokenizer))
        self.folder = Path(config.output_dir)
        self.writer: Any = None
        vocabulary = self.text_tokenizer.vocabulary
        mine = (self.image_tokenizer.num_codes, tuple(self.image_tokenizer.grid))
        theirs = (vocabulary.num_image_codes, vocabulary.image_grid)
        if mine != theirs:
            raise ValueError(
                f"data.image_tokenizer={config.data.image_tokenizer}: has {mine[0]} codes on a grid of {mine[1]}, the "
                f"vocabulary says {theirs[0]} on {theirs[1]}; use the image tokenizer that made the shards"
            )
        for prompt in config.logging.drawing.prompts:
            length = 1 + len(self.text_tokenizer.encode(prompt)) + vocabulary.image_length
            if length > config.model.context_length:
                raise ValueError(
                    f"logging.drawing.prompts: {prompt!r} with its picture takes {length} ids, more than "
                    f"model.context_length={config.model.context_length}; shorten it"
                )

    def on_start(self, trainer: "Trainer") -> None:
        """Open TensorBoard if it is wanted."""
        if trainer.context.is_main and trainer.config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                str(self.folder / TENSORBOARD_FOLDER), purge_step=trainer.step + 1, filename_suffix=".pictures"
            )

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Draw."""
        from megachameleon.generation.drawing import draw
        from megachameleon.generation.model_steppers import CachedStepper
        from megachameleon.generation.sampling import SamplingSettings
        from megachameleon.generation.settings import GenerationSettings

        drawing = trainer.config.logging.drawing
        settings = GenerationSettings(
            image=SamplingSettings(temperature=drawing.temperature, top_p=drawing.top_p),
            guidance=drawing.guidance,
            seed=drawing.seed,
        )
        pictures = draw(
            CachedStepper(trainer.state.model, trainer.config.model.context_length),
            trainer.data.vocabulary,
            self.text_tokenizer,
            self.image_tokenizer,
            drawing.prompts,
            settings,
            replicas=trainer.context.groups.dp,
        )
        if trainer.context.is_main:
            self._save(step, drawing.prompts, pictures)

    def on_end(self, trainer: "Trainer") -> None:
        """Close TensorBoard."""
        if self.writer is not None:
            self.writer.close()

    def _save(self, step: int, prompts: tuple[str, ...], pictures: list[Any]) -> None:
        folder = self.folder / SAMPLES_FOLDER / checkpoint_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            picture.save(folder / f"{i:02d}.png")
            if self.writer is not None:
                self.writer.add_image(f"drawn/{prompt}", np.asarray(picture), step, dataformats="HWC")
        write_json(folder / PROMPTS_FILE, list(prompts))
