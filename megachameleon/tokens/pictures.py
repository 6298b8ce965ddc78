"""Pictures from bytes to the square of pixels that an image tokenizer takes.

The rules are those of Chameleon's released preprocessing: transparency over white, the short side resized with LANCZOS,
a centre crop. Sizes are bounded on the way, because pictures come from strangers.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Largest picture that is decoded, and largest one that resizing may produce: 67 million pixels, 200 MB as RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def open_picture(data: bytes, origin: str) -> Image.Image:
    """Decode a picture completely.

    Args:
        data: an encoded PNG, JPEG, WebP, GIF or BMP file.
        origin: where it came from, for errors.

    Raises:
        ValueError: not a picture of these formats, damaged, or larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; our limit follows
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{origin}: {image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}; shrink it"
                )
            image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{origin}: not a picture ({len(data)} bytes; known are {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow refuses the largest ones before we see their sides
        size = f"{int(pixels[0]):,}" if pixels else "too many"
        raise ValueError(f"{origin}: {size} pixels exceed the limit of {MAX_PIXELS:,}; shrink it") from None
    except (OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise ValueError(f"{origin}: damaged picture ({error})") from None
    return image


def prepare_picture(image: Image.Image, size: int) -> np.ndarray:
    """Bring a picture to a square: alpha over white, short side to `size` with LANCZOS, centre crop.

    Args:
        image: a decoded picture of any mode.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        ValueError: so long and thin that resizing it would exceed `MAX_PIXELS`.
    """
    image = _over_white(image)
    scale = size / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"a picture of {image.width} x {image.height} pixels would become {width} x {height}; crop it before use"
        )
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    opacity = alpha.astype(np.float64) / 255
    blended = opacity * rgba[..., :3] + (1 - opacity) * 255
    return Image.fromarray(blended.astype(np.uint8))
