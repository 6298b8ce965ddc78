"""Ways from an encoded picture to a square of pixels, which `benchmarks.picture_preparation` compares.

Each takes bytes and a size and gives uint8 [3, size, size].
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

Preparer = Callable[[bytes, int], np.ndarray]


def ours(data: bytes, size: int) -> np.ndarray:
    """The fast path."""
    from megachameleon.tokens.pictures import prepare_encoded

    return prepare_encoded(data, "benchmark", size)


def ours_exact(data: bytes, size: int) -> np.ndarray:
    """Pillow's pixels by our code."""
    from megachameleon.tokens.pictures import prepare_encoded

    return prepare_encoded(data, "benchmark", size, exact=True)


def pillow(data: bytes, size: int) -> np.ndarray:
    """Chameleon's rules as a few lines of Pillow; the reference of pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def pillow_draft(data: bytes, size: int) -> np.ndarray:
    """The same after letting the decoder shrink by powers of two where it can."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (size, size))
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def make_opencv(interpolation: str) -> Preparer:
    """OpenCV decodes and resizes by `INTER_` and the given name."""
    import cv2

    cv2.setNumThreads(1)
    method = getattr(cv2, f"INTER_{interpolation}")

    def opencv(data: bytes, size: int) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        scale = size / min(pixels.shape[:2])
        height, width = (round(scale * side) for side in pixels.shape[:2])
        resized = cv2.resize(pixels, (width, height), interpolation=method)
        left, top = (width - size) // 2, (height - size) // 2
        return np.ascontiguousarray(resized[top : top + size, left : left + size].transpose(2, 0, 1))

    return opencv


def make_huggingface() -> Preparer:
    """Transformers' processor for Chameleon on Pillow, up to pixels: without rescaling them to floats."""
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    def huggingface(data: bytes, size: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        side, square = {"shortest_edge": size}, {"height": size, "width": size}
        made = processor(image, size=side, crop_size=square, do_rescale=False, do_normalize=False)
        return np.asarray(made["pixel_values"][0])

    processor = ChameleonImageProcessorPil()
    return huggingface


BUILDERS: dict[str, Callable[[], Preparer]] = {
    "ours": lambda: ours,
    "ours-exact": lambda: ours_exact,
    "pillow": lambda: pillow,
    "pillow-draft": lambda: pillow_draft,
    "huggingface": make_huggingface,
    "opencv-area": lambda: make_opencv("AREA"),
    "opencv-lanczos": lambda: make_opencv("LANCZOS4"),
}
