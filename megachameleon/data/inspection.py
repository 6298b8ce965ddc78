"""A page that shows what is in a dataset: counts, and documents with their pictures drawn from the codes."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.data.shards import Dataset
from megachameleon.files import write_text
from megachameleon.tokens.text import TextTokenizer

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer

MAX_SHOWN_IDS = 20_000
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
        if given is not None and made is not None and made != given:
            raise ValueError(f"the dataset was made with {name} {made}, not {given}; give the one it was made with")
    rows = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{count:,}</td></tr>" for what, count in dataset_counts(dataset).items()
    )
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(num_documents, len(dataset)), dtype=np.int64))
    articles = "".join(_article(dataset, index, tokenizer, image_tokenizer) for index in chosen.tolist())
    title = f"{len(dataset):,} documents, {len(chosen)} of them shown"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    write_text(path, f"{page}<h1>{title}</h1><table>{rows}</table>{articles}</html>\n")


def _article(dataset: Dataset, index: int, tokenizer: TextTokenizer, image_tokenizer: "ImageTokenizer | None") -> str:
    document = np.asarray(dataset.document(index)[:MAX_SHOWN_IDS], dtype=np.int64)
    parts, done = [], 0
    for start, length in dataset.image_spans(index).tolist():
        if start + length > len(document):
            break
        parts.append(_text(tokenizer.decode(document[done:start])))
        parts.append(_picture(document[start + 1 : start + length - 1], dataset, image_tokenizer))
        done = start + length
    parts.append(_text(tokenizer.decode(document[done:])))
    cut = f'<p class="cut">… {dataset.lengths[index] - len(document):,} more ids</p>'
    more = cut if len(document) < dataset.lengths[index] else ""
    return f"<article><h2>document {index}, {dataset.lengths[index]:,} ids</h2>{''.join(parts)}{more}</article>"


def _text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def _picture(ids: np.ndarray, dataset: Dataset, image_tokenizer: "ImageTokenizer | None") -> str:
    if image_tokenizer is None or not image_tokenizer.can_decode:
        return "<p>[picture]</p>"
    from PIL import Image

    pixels = image_tokenizer.decode((ids - dataset.vocabulary.image_code_start)[None])[0].numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, format="PNG")
    return f'<img alt="picture" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
