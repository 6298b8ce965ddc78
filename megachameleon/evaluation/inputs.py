"""What drawing and reading pictures need, checked before any weight is loaded."""

from dataclasses import dataclass
from pathlib import Path

from megachameleon.evaluation.gallery import Gallery, NamedPrompt, load_gallery, read_named_prompts
from megachameleon.generation.loading import (
    CheckpointInfo,
    load_image_tokenizer,
    load_text_tokenizer,
    read_checkpoint_info,
)
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vq.tokenizer import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A checkpoint's tokenizers, prompts, and the pictures that they name."""

    info: CheckpointInfo
    """Of the checkpoint."""
    text: TextTokenizer
    """That of the checkpoint's data."""
    pictures: ImageTokenizer
    """That of the checkpoint's data."""
    prompts: list[NamedPrompt]
    """As many as were asked for."""
    gallery: Gallery
    """With a picture for each prompt."""


def read_inputs(
    checkpoint: Path,
    prompts: Path,
    gallery: Path,
    *,
    limit: int | None = None,
    tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
) -> Inputs:
    """Read all but the weights.

    Args:
        limit: keep the first prompts only.
        tokenizer: overrides the folder that the checkpoint names; likewise `image_tokenizer`.

    Raises:
        ValueError: anything missing or damaged, or a prompt whose picture is not in the gallery.
    """
    info = read_checkpoint_info(checkpoint)
    named = read_named_prompts(prompts)[:limit]
    text = load_text_tokenizer(info, tokenizer)
    pictures = load_image_tokenizer(info, image_tokenizer)
    real = load_gallery(gallery, pictures.image_size)
    # only to fail now: drawing takes long, and a missing picture would show at its end
    real.positions([prompt.key for prompt in named], str(prompts))
    return Inputs(info=info, text=text, pictures=pictures, prompts=named, gallery=real)
