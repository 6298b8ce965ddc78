"""The viewer: ids to texts and pictures, and those to Markdown, HTML, PNG and JSON."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megachameleon.files import atomic_path
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq.tokenizer import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A run of text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PicturePart:
    """A picture, or the codes of one that was cut off."""

    codes: tuple[int, ...]
    """Codebook indices in raster order."""
    expected: int
    """Number of codes in a whole picture."""
    image: Image.Image | None
    """None where codes are missing: nothing is invented."""

    @property
    def complete(self) -> bool:
        """Whether all codes are there."""
        return len(self.codes) == self.expected


Part = TextPart | PicturePart


def render(
    documents: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer | None,
) -> list[list[Part]]:
    """Ids of each document to its parts in order; control ids are left out, pictures are decoded in one batch.

    Without an image tokenizer, pictures stay codes.
    """
    runs = [_runs(ids, vocabulary) for ids in documents]
    whole = [
        run
        for document in runs
        for is_picture, run in document
        if is_picture and len(run) == vocabulary.codes_per_image
    ]
    images: list[Image.Image] = []
    if image_tokenizer is not None:
        images = decode_pictures(
            np.array(whole, dtype=np.int64).reshape(-1, vocabulary.codes_per_image), image_tokenizer
        )
    remaining = iter(images)

    def part(is_picture: bool, run: list[int]) -> Part:
        if not is_picture:
            return TextPart(text=text_tokenizer.decode(run))
        expected = vocabulary.codes_per_image
        image = next(remaining, None) if len(run) == expected else None
        return PicturePart(codes=tuple(run), expected=expected, image=image)

    return [[part(*run) for run in document] for document in runs]


def decode_pictures(codes: np.ndarray, image_tokenizer: ImageTokenizer) -> list[Image.Image]:
    """Codebook indices int64 [B, codes_per_image] to RGB pictures."""
    pixels = image_tokenizer.decode(torch.from_numpy(codes)).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))) for picture in pixels]


def _runs(ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[bool, list[int]]]:
    """Split ids into (is_picture, run): text ids, or codebook indices."""
    runs: list[tuple[bool, list[int]]] = []
    in_picture = False
    for one in ids:
        # also within a picture: models may emit what the rules of our engine forbid
        if one == vocabulary.begin_image:
            runs.append((True, []))
            in_picture = True
        elif in_picture and vocabulary.is_image_code(one):
            runs[-1][1].append(one - vocabulary.image_code_start)
        else:
            in_picture = False
            if one >= vocabulary.text_start:
                if not runs or runs[-1][0]:
                    runs.append((False, []))
                runs[-1][1].append(one)
    return runs


def save_pictures(parts: Sequence[Part], folder: Path, stem: str) -> list[str | None]:
    """Write the pictures of a document as `STEM-0.png`, …; a name per part, None for text and cut pictures."""
    names: list[str | None] = []
    for part in parts:
        name = None
        if isinstance(part, PicturePart) and part.image is not None:
            name = f"{stem}-{sum(n is not None for n in names)}.png"
            with atomic_path(folder / name) as temporary:
                part.image.save(temporary, format="PNG")
        names.append(name)
    return names


def as_json(parts: Sequence[Part], names: Sequence[str | None]) -> list[dict[str, Any]]:
    """The parts as plain values: {"text"}, {"image"}, or {"incomplete_image": codes, "expected": codes}."""
    return [
        {"text": part.text}
        if isinstance(part, TextPart)
        else ({"image": name} if name else {"incomplete_image": len(part.codes), "expected": part.expected})
        for part, name in zip(parts, names, strict=True)
    ]


def as_markdown(parts: Sequence[Part], names: Sequence[str | None]) -> str:
    """The document as Markdown, with pictures by file name."""
    blocks = [
        part.text if isinstance(part, TextPart) else (f"![picture]({name})" if name else f"*{cut_note(part)}*")
        for part, name in zip(parts, names, strict=True)
    ]
    return "\n\n".join(blocks) + "\n"


def as_html(parts: Sequence[Part], names: Sequence[str | None]) -> str:
    """The document as an HTML fragment, with pictures by file name and all text escaped."""
    blocks = []
    for part, name in zip(parts, names, strict=True):
        if isinstance(part, TextPart):
            blocks.append(f"<p>{html.escape(part.text)}</p>")
        elif name:
            blocks.append(f'<img src="{html.escape(name, quote=True)}" alt="picture">')
        else:
            blocks.append(f"<p class=cut>{cut_note(part)}</p>")
    return "\n".join(blocks)


def cut_note(part: PicturePart) -> str:
    """What is said instead of a picture that cannot be shown."""
    if part.complete:
        return f"[picture of {part.expected} codes; no image tokenizer to decode it]"
    return f"[picture cut off after {len(part.codes)} of {part.expected} codes]"


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size on a white grid, left to right and top to bottom.

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError("contact sheet: no pictures to show")
    gap, (width, height) = 4, images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
