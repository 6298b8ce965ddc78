"""A page that shows what is in a dataset: counts, and documents with their pictures drawn from the codes."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.console import track
from megachameleon.data.shards.reader import Dataset
from megachameleon.files import write_text
from megachameleon.tokens.text import TextTokenizer

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer

MAX_SHOWN_IDS = 20_000
"""Of one document."""
MAX_SHOWN_TEXT = 4_000
"""Characters of one stretch of text."""
MAX_SHOWN_PICTURES = 96
"""On the whole page; others get a mark."""
SHOWN_SIDE = 256
"""Largest side of a picture on the page, in pixels."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td { padding: .2rem 1rem .2rem 0 } td + td { text-align: right }
article { border-top: 1px solid #ccc; padding: 1rem 0 } h2 { font-size: 1rem; color: #666; margin: 0 0 .5rem }
img { vertical-align: middle; margin: .25rem; image-rendering: pixelated } pre { white-space: pre-wrap; margin: 0 }
.cut { color: #999 }
"""


def dataset_counts(dataset: Dataset) -> dict[str, int]:
    """Counts to print, by what they count."""
    manifests = [shard.manifest for shard in dataset.shards]
    return {
        "shards": len(manifests),
        "documents": len(dataset),
        "ids": dataset.num_tokens,
        "ids of text": sum(manifest.num_text_tokens for manifest in manifests),
        "ids of pictures": sum(manifest.num_image_tokens for manifest in manifests),
        "pictures": sum(manifest.num_images for manifest in manifests),
        "records set aside": sum(sum(manifest.quarantined.values()) for manifest in manifests),
        "records filtered out": sum(manifest.filtered for manifest in manifests),
        "duplicates left out": sum(manifest.duplicates for manifest in manifests),
        "longest document, ids": int(dataset.lengths.max()),
        "median document, ids": int(np.median(dataset.lengths)),
    }


def write_page(
    dataset: Dataset,
    tokenizer: TextTokenizer,
    image_tokenizer: "ImageTokenizer | None",
    path: Path,
    *,
    num_documents: int = 24,
) -> None:
    """Write a self-contained HTML page with counts and a few documents, spread evenly over the dataset.

    Args:
        image_tokenizer: None, or one without a decoder, shows a mark in the place of each picture.

    Raises:
        ValueError: the dataset was made with other tokenizers.
    """
    dataset.vocabulary.require_same(tokenizer.vocabulary, "the dataset", "the tokenizer")
    for name, made, given in (
        ("tokenizer", dataset.tokenizer, tokenizer.fingerprint),
        ("image tokenizer", dataset.image_tokenizer, image_tokenizer.fingerprint if image_tokenizer else None),
    ):
        # shards without pictures may have been made without an image tokenizer
        if given is not None and made is not None and made != given:
            raise ValueError(f"the dataset was made with {name} {made}, not {given}; give the one it was made with")
    rows = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{count:,}</td></tr>" for what, count in dataset_counts(dataset).items()
    )
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(num_documents, len(dataset)), dtype=np.int64))
    draw = _Drawer(dataset, image_tokenizer)
    articles = "".join(
        _article(dataset, index, tokenizer, draw) for index in track(chosen.tolist(), "drawing documents")
    )
    title = f"{len(dataset):,} documents, {len(chosen)} of them shown"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    write_text(path, f"{page}<h1>{title}</h1><table>{rows}</table>{articles}</html>\n")


def _article(dataset: Dataset, index: int, tokenizer: TextTokenizer, draw: "_Drawer") -> str:
    document = np.asarray(dataset.document(index)[:MAX_SHOWN_IDS], dtype=np.int64)
    parts, done = [], 0
    # only whole pictures can be drawn, and the cut may go through one
    for start, length in dataset.image_spans(index).tolist():
        if start + length > len(document):
            break
        parts.append(_text(tokenizer.decode(document[done:start])))
        parts.append(draw(document[start + 1 : start + length - 1]))
        done = start + length
    parts.append(_text(tokenizer.decode(document[done:])))
    cut = f'<p class="cut">… {dataset.lengths[index] - len(document):,} more ids</p>'
    more = cut if len(document) < dataset.lengths[index] else ""
    return f"<article><h2>document {index}, {dataset.lengths[index]:,} ids</h2>{''.join(parts)}{more}</article>"


def _text(text: str) -> str:
    if not text:
        return ""
    more = len(text) - MAX_SHOWN_TEXT
    cut = f'<span class="cut"> … {more:,} more characters</span>' if more > 0 else ""
    return f"<pre>{html.escape(text[:MAX_SHOWN_TEXT])}{cut}</pre>"


class _Drawer:
    """Pictures for the page, few and small enough for it."""

    def __init__(self, dataset: Dataset, image_tokenizer: "ImageTokenizer | None") -> None:
        self._first_code = dataset.vocabulary.image_code_start
        self._tokenizer = image_tokenizer if image_tokenizer is not None and image_tokenizer.can_decode else None
        self._left = MAX_SHOWN_PICTURES

    def __call__(self, ids: np.ndarray) -> str:
        """The element that shows a picture of these code ids [codes_per_image]."""
        if self._tokenizer is None or self._left == 0:
            return '<p class="cut">[picture]</p>'
        # imported here, for a page without pictures needs no Pillow
        from PIL import Image

        self._left -= 1
        pixels = self._tokenizer.decode((ids - self._first_code)[None])[0].numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        file = io.BytesIO()
        if image.width > SHOWN_SIDE:
            image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        kind = "jpeg" if image.width > 64 else "png"  # a PNG of a photograph is ten times as large
        image.save(file, format=kind, quality=88)
        return f'<img alt="picture" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'
