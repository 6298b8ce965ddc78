"""Files of transformers' `ChameleonProcessor`: how pictures become pixels, and how many places one takes in a text."""

from typing import Any

from megachameleon.tokens.vocabulary import Vocabulary

LANCZOS = 1
"""Pillow's number for it."""


def image_processor_settings(size: int) -> dict[str, Any]:
    """preprocessor_config.json for pictures of `size` x `size` pixels: Meta's rules, as far as transformers has them.

    Pixels become x / 127.5 - 1. transformers' own factor for Chameleon, 0.0078, makes white 0.989 instead of 1.
    """
    ones = [1.0, 1.0, 1.0]
    return {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": LANCZOS,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "do_normalize": True,
        "image_mean": ones,
        "image_std": ones,
    }


def processor_settings(vocabulary: Vocabulary, image_token: str) -> dict[str, Any]:
    """processor_config.json: `image_token` in a text becomes begin, this many placeholders, and end."""
    return {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": vocabulary.codes_per_image,
        "image_token": image_token,
    }
