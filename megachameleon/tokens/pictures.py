"""Pictures from bytes to the square of pixels that an image tokenizer takes.

The rules are those of Chameleon's released preprocessing: transparency over white, the short side resized with LANCZOS,
a centre crop; neither an EXIF orientation nor a colour profile is applied. Sizes are bounded on the way, because
pictures come from strangers.

`prepare_picture` is Pillow alone and defines the pixels. `prepare_encoded` comes within `FAST_DISTANCE` of them in a
quarter of the time.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Largest picture that is decoded, and largest one that resizing may produce: 67 million pixels, 200 MB as RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may decode; its many other formats are not offered to files from strangers."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Names by which folders and tars are searched, in lower case."""

FAST_DISTANCE = (0.02, 2)
"""Bounds on what `prepare_encoded` differs from Pillow's pixels: mean and largest absolute difference, of 255."""

BLEND_ROWS = 64
"""Rows that are blended at once."""

Fit = Literal["crop", "pad"]
"""crop: the short side fills the square and the middle is kept. pad: the whole picture, with a white border."""


def prepare_encoded(data: bytes, origin: str, size: int, *, fit: Fit = "crop", exact: bool = False) -> np.ndarray:
    """Bring an encoded picture to a square, fast.

    JPEGs are decoded by libjpeg-turbo without Pillow around it, to the same pixels; whatever it does not take without
    complaint, Pillow decodes or refuses. Resizing is torch's, with LANCZOS weights of 16 bits instead of Pillow's 22:
    the result is the same on every x86 CPU, but not Pillow's (`FAST_DISTANCE`).

    Args:
        data: an encoded PNG, JPEG, WebP, GIF or BMP file; of an animation the first picture is taken.
        origin: where it came from, for errors.
        size: side of the result in pixels.
        fit: what happens to pictures that are not square.
        exact: Pillow alone, for the very pixels of `prepare_picture`.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        ValueError: not a picture, damaged, or of a size that is refused.
    """
    image = _open(data, origin)
    try:
        if exact:
            return prepare_picture(_load(image, data, origin), size, fit=fit)
        resized_to = fitted_size(image.width, image.height, size, fit)
    except _RefusedShapeError as error:
        raise ValueError(f"{origin}: {error}") from None
    return _to_square(_resize(_decode(image, data, origin), *resized_to), size)


def open_picture(data: bytes, origin: str) -> Image.Image:
    """Decode a picture completely, with Pillow.

    Args:
        data: an encoded PNG, JPEG, WebP, GIF or BMP file.
        origin: where it came from, for errors.

    Raises:
        ValueError: not a picture of these formats, damaged, or larger than `MAX_PIXELS`.
    """
    return _load(_open(data, origin), data, origin)


def prepare_picture(image: Image.Image, size: int, *, fit: Fit = "crop") -> np.ndarray:
    """Bring a picture to a square: alpha over white, LANCZOS, then the middle of it or a white border.

    Args:
        image: a decoded picture of any mode.
        size: side of the result in pixels.
        fit: what happens to pictures that are not square.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        ValueError: so long and thin that resizing it would exceed `MAX_PIXELS` or leave nothing.
    """
    width, height = fitted_size(image.width, image.height, size, fit)
    if image.mode != "RGB":
        image = Image.fromarray(_over_white(image))
    # Rounding stands between the two passes, and which is the first one of a tall picture depends on Pillow's version.
    image = image.resize((width, image.height), Image.Resampling.LANCZOS)
    return _to_square(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)), size)


def fitted_size(width: int, height: int, size: int, fit: Fit) -> tuple[int, int]:
    """Width and height that a picture is resized to, before the crop or the border.

    Raises:
        ValueError: the picture is too long and thin, or `fit` is unknown.
    """
    if fit not in ("crop", "pad"):
        raise ValueError(f"fit: {fit!r} is unknown; use 'crop' or 'pad'")
    scale = size / (min(width, height) if fit == "crop" else max(width, height))
    # round() as in the release; others cut off the fraction, and one pixel less changes the whole picture
    new_width, new_height = round(scale * width), round(scale * height)
    if new_width * new_height > MAX_PIXELS or not (new_width and new_height):
        raise _RefusedShapeError(
            f"a picture of {width} x {height} pixels would become {new_width} x {new_height}; crop it before use"
        )
    return new_width, new_height


class _RefusedShapeError(ValueError):
    """So long and thin that it cannot be resized."""


def _open(data: bytes, origin: str) -> Image.Image:
    """Read the header only; what is too large is refused here."""
    with _naming(data, origin):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{origin}: {image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}; shrink it"
        )
    return image


def _load(image: Image.Image, data: bytes, origin: str) -> Image.Image:
    with _naming(data, origin):
        image.load()
    return image


@contextmanager
def _naming(data: bytes, origin: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a `ValueError` that names the picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; our limit is another
            yield
    except UnidentifiedImageError:
        raise ValueError(f"{origin}: not a picture ({len(data)} bytes; known are {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow refuses the largest ones before we see their sides
        size = f"{int(pixels[0]):,}" if pixels else "too many"
        raise ValueError(f"{origin}: {size} pixels exceed the limit of {MAX_PIXELS:,}; shrink it") from None
    except Exception as error:  # on damaged files its decoders raise nearly anything
        raise ValueError(f"{origin}: damaged picture ({error})") from None


def _decode(image: Image.Image, data: bytes, origin: str) -> np.ndarray:
    """Pixels of a picture of which Pillow has read the header, uint8 [height, width, 3]."""
    # CMYK and others have no one way to RGB; Pillow's is the rule
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] == (image.height, image.width):  # it allocates what it reads
                return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError:
            pass  # it refuses what libjpeg only warns of; Pillow decides
    _load(image, data, origin)
    return np.asarray(image) if image.mode == "RGB" else _over_white(image)


def _over_white(image: Image.Image) -> np.ndarray:
    """Colours blended over white, uint8 [height, width, 3]."""
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[..., 3].min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    blended = np.empty((*rgba.shape[:2], 3), np.uint8)
    for start in range(0, len(rgba), BLEND_ROWS):  # large pictures would need their size eight times over
        rows = rgba[start : start + BLEND_ROWS]
        blended[start : start + BLEND_ROWS] = _white_blends().take(rows[..., 3:] * np.intp(256) + rows[..., :3])
    return blended


@cache
def _white_blends() -> np.ndarray:
    """Each colour under each opacity, blended in fp64 and truncated: uint8 [256 alphas, 256 values]."""
    opacity = np.arange(256)[:, None] / 255
    # truncated and not rounded, as the release does
    return (opacity * np.arange(256) + (1 - opacity) * 255).astype(np.uint8)


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """LANCZOS with torch's integer kernel, uint8 [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # seconds and memory that readers of text do without
    import torch.nn.functional as F

    writable = np.require(pixels, requirements=("C", "W"))  # torch warns of arrays that are not
    source = torch.from_numpy(writable).permute(2, 0, 1)[None]  # channels last, which has the fast kernel
    return F.interpolate(source, size=(height, width), mode="lanczos", antialias=True)[0].permute(1, 2, 0).numpy()


def _to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cut the middle out, or set it on white: uint8 [height, width, 3] to [3, size, size]."""
    height, width = pixels.shape[:2]
    # the release's offset; rounding otherwise moves the crop by a pixel
    left, top = max(width - size, 0) // 2, max(height - size, 0) // 2
    middle = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
    if middle.shape[1:] == (size, size):
        return np.ascontiguousarray(middle)
    square = np.full((3, size, size), 255, np.uint8)
    top, left = (size - middle.shape[1]) // 2, (size - middle.shape[2]) // 2
    square[:, top : top + middle.shape[1], left : left + middle.shape[2]] = middle
    return square
