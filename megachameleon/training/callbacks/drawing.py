"""Pictures that the model draws at every validation: on disk, and handed to the other callbacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megachameleon.checkpoint.folder import checkpoint_name
from megachameleon.config import RunConfig
from megachameleon.files import write_json
from megachameleon.training.callbacks.base import Callback
from megachameleon.training.losses import LossReport
from megachameleon.training.monitors.picture_codes import describe_codes

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

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Draw."""
        from megachameleon.generation.drawing import draw_codes
        from megachameleon.generation.model_steppers import CachedStepper
        from megachameleon.generation.rendering import decode_pictures
        from megachameleon.generation.sampling import SamplingSettings
        from megachameleon.generation.settings import GenerationSettings

        drawing = trainer.config.logging.drawing
        settings = GenerationSettings(
            image=SamplingSettings(temperature=drawing.temperature, top_p=drawing.top_p),
            guidance=drawing.guidance,
            seed=drawing.seed,
        )
        codes = draw_codes(
            CachedStepper(trainer.state.model, trainer.config.model.context_length),
            trainer.data.vocabulary,
            self.text_tokenizer,
            drawing.prompts,
            settings,
            replicas=trainer.context.groups.dp,
        )
        pictures = decode_pictures(codes, self.image_tokenizer)
        if trainer.context.is_main:
            self._save(step, drawing.prompts, pictures)
        # With codes that did not occur: the share in use is of the whole codebook.
        counts = np.bincount(codes.ravel(), minlength=self.image_tokenizer.num_codes)
        values = describe_codes(counts.tolist(), "drawn_codes")
        for callback in trainer.callbacks:
            callback.on_drawing(trainer, step, drawing.prompts, pictures, values)

    def _save(self, step: int, prompts: tuple[str, ...], pictures: list[Any]) -> None:
        folder = self.folder / SAMPLES_FOLDER / checkpoint_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            picture.save(folder / f"{i:02d}.png")
        write_json(folder / PROMPTS_FILE, list(prompts))
