"""JPEGs like those of a camera, drawn from a seed: pictures that anyone can make again without a download."""

import io

import numpy as np
from PIL import Image, ImageDraw

QUALITY = 85
"""Of the JPEGs, with 4:2:0 chroma."""

SLOPE = 2.2
"""Amplitudes of natural pictures fall with about this power of the frequency, once a lens has softened them."""

SHAPES, GRAIN = 40, 1.5
"""Lines and discs in a picture, and the deviation of its noise, of 255."""


def make_jpegs(count: int, width: int, height: int, seed: int) -> list[bytes]:
    """Encoded pictures; at 1024 x 768 about 95 KB each."""
    jpegs = []
    for number in range(count):
        file = io.BytesIO()
        draw_photograph(np.random.default_rng((seed, number)), width, height).save(
            file, "JPEG", quality=QUALITY, subsampling="4:2:0"
        )
        jpegs.append(file.getvalue())
    return jpegs


def draw_photograph(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Clouds with the spectrum of natural pictures, shapes with hard edges, and grain."""
    across, down = np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None]
    frequency = np.hypot(across, down)
    # the mean has frequency 0, by which nothing can be divided
    frequency[0, 0] = 1 / max(width, height)
    spectrum = random.standard_normal((2, 3, *frequency.shape))
    clouds = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) / frequency**SLOPE, (height, width))
    clouds = (clouds / clouds.std(axis=(1, 2), keepdims=True)).transpose(1, 2, 0)
    image = Image.fromarray((128 + 40 * clouds[..., :1] + 16 * clouds).clip(0, 255).astype(np.uint8))
    _draw_shapes(ImageDraw.Draw(image), random, width, height)
    grain = random.normal(0, GRAIN, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def _draw_shapes(draw: ImageDraw.ImageDraw, random: np.random.Generator, width: int, height: int) -> None:
    for number in range(SHAPES):
        colour = tuple(random.integers(0, 256, 3).tolist())
        (x, x2), (y, y2) = random.integers(0, width, 2).tolist(), random.integers(0, height, 2).tolist()
        if number % 2:
            draw.line([x, y, x2, y2], fill=colour, width=int(random.integers(1, 6)))
        else:
            radius = int(random.integers(2, max(3, width // 12)))
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
