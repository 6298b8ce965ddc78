"""The two everyday uses in one call each: captions to pictures, pictures to captions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from megachameleon.generation.rendering import decode_pictures
from megachameleon.generation.replicas import generate_shared
from megachameleon.generation.settings import GenerationSettings
from megachameleon.generation.stepper import Stepper
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq.tokenizer import ImageTokenizer


def draw(
    stepper: Stepper,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    replicas: Any | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per caption. The prompt is bos, the caption, begin-image; `settings.modality` is ignored.

    Raises:
        ValueError: a caption is too long to leave room for a picture.
    """
    codes = draw_codes(
        stepper, vocabulary, text_tokenizer, prompts, settings, replicas=replicas, on_finished=on_finished
    )
    return decode_pictures(codes, image_tokenizer)


def draw_codes(
    stepper: Stepper,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    replicas: Any | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The codes of the pictures of `draw`, int64 [prompts, codes_per_image], counted from 0."""
    # exactly one whole picture: the state machine ends the row with it
    settings = replace(settings, modality="image", max_pictures=1, max_new_tokens=vocabulary.image_length)
    ids = [[vocabulary.bos, *text_tokenizer.encode(prompt)] for prompt in prompts]
    drawn = generate_shared(stepper, vocabulary, ids, settings, replicas=replicas, on_finished=on_finished)
    # without begin and end ids; reshape keeps two axes where there are no prompts
    codes = np.array([row[1:-1] for row in drawn], dtype=np.int64).reshape(-1, vocabulary.codes_per_image)
    return codes - vocabulary.image_code_start


def describe(
    stepper: Stepper,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    pictures: np.ndarray,
    settings: GenerationSettings,
    *,
    replicas: Any | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[str]:
    """Write a caption per picture, uint8 [B, 3, image_size, image_size]; `settings.modality` is ignored."""
    settings = replace(settings, modality="text")
    codes = image_tokenizer.encode(torch.from_numpy(pictures)).cpu().numpy()
    ids = [[vocabulary.bos, *vocabulary.encode_image(row).tolist()] for row in codes]
    written = generate_shared(stepper, vocabulary, ids, settings, replicas=replicas, on_finished=on_finished)
    return [text_tokenizer.decode(row) for row in written]
