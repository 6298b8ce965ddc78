"""Which keys of a JSON object or columns of a parquet row make which record; the first form that fits is taken.

    segments                            interleaved: [{"text": ...}, {"image": ..., "fit": "pad"}, ...]
    texts + images                      interleaved: two lists, at each place one of the two is null
    a picture + caption, captions, text or content    a picture with captions
    text or content                     text

A picture is under `image`, `image_base64`, `file_name`, `jpg`, `jpeg`, `png` or `webp`: the name of a file beside the
source, a `data:` URI, bytes, or {"bytes": ..., "path": ...}. Null counts as absent; other keys are ignored.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from megachameleon.data.records import (
    Caption,
    CaptionedRecord,
    Fit,
    PictureSegment,
    Record,
    Segment,
    SegmentsRecord,
    TextSegment,
    checked_text,
    parse_captions,
)

TEXT_KEYS = ("text", "content")
CAPTION_KEYS = ("caption", "captions")
PICTURE_KEYS = ("image", "image_base64", "file_name", "jpg", "jpeg", "png", "webp")
FORM_KEYS = ("segments", "texts", "images", *CAPTION_KEYS, *PICTURE_KEYS, *TEXT_KEYS)

ReadPicture = Callable[[object], bytes]
"""Finds the picture that a value names, or raises ValueError."""


def record_of(origin: str, values: Mapping[str, Any], read_picture: ReadPicture) -> Record:
    """Make a record of plain values.

    Raises:
        ValueError: no form fits, a text is empty, or a picture cannot be found.
    """
    # columns of a table are null where another form is meant
    present = {key: value for key, value in values.items() if value is not None}
    if "segments" in present:
        return SegmentsRecord(origin, segments_of(present["segments"], read_picture))
    if "texts" in present and "images" in present:
        return SegmentsRecord(origin, _parallel(present["texts"], present["images"], read_picture))
    text = next((key for key in TEXT_KEYS if key in present), None)
    picture = next((key for key in PICTURE_KEYS if key in present), None)
    if picture is not None:
        captions = parse_captions(present)
        if not captions and text is not None:
            captions = (Caption(checked_text(present[text], text)),)
        if not captions:
            raise ValueError("a picture without a caption")
        return CaptionedRecord(origin, _picture(present[picture], picture, read_picture), captions)
    if text is not None:
        return SegmentsRecord(origin, (TextSegment(checked_text(present[text], text)),))
    raise ValueError(f"unknown form: none of {', '.join(FORM_KEYS)} fits the keys {sorted(present)}")


def segments_of(entries: Any, read_picture: ReadPicture) -> tuple[Segment, ...]:
    """The segments of `{"segments": [...]}`, each with exactly one of `text`, `image`, `image_base64`.

    Raises:
        ValueError: another form, or a picture that cannot be found.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError("segments is not a list with entries")
    return tuple(_segment(entry, f"segments[{number}]", read_picture) for number, entry in enumerate(entries))


def _segment(entry: Any, where: str, read_picture: ReadPicture) -> Segment:
    kinds = ("text", "image", "image_base64")
    present = [key for key in kinds if isinstance(entry, dict) and entry.get(key) is not None]
    if len(present) != 1:
        raise ValueError(f"{where} needs exactly one of {', '.join(kinds)}")
    if present == ["text"]:
        return TextSegment(checked_text(entry["text"], f"{where}.text"))
    fit = entry.get("fit") or "crop"
    if fit not in ("crop", "pad"):
        raise ValueError(f"{where}.fit is {fit!r}, neither crop nor pad")
    return _picture(entry[present[0]], f"{where}.{present[0]}", read_picture, cast(Fit, fit))


def _parallel(texts: Any, images: Any, read_picture: ReadPicture) -> tuple[Segment, ...]:
    if not (isinstance(texts, Sequence) and isinstance(images, Sequence)) or not texts or len(texts) != len(images):
        raise ValueError("texts and images are not two lists of one length")
    segments: list[Segment] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise ValueError(f"exactly one of texts[{number}] and images[{number}] must be null")
        if text is not None:
            segments.append(TextSegment(checked_text(text, f"texts[{number}]")))
        else:
            segments.append(_picture(image, f"images[{number}]", read_picture))
    return tuple(segments)


def _picture(value: Any, where: str, read_picture: ReadPicture, fit: Fit = "crop") -> PictureSegment:
    if where.endswith("image_base64"):
        try:
            return PictureSegment(base64.b64decode(value, validate=True), where, fit)
        except (TypeError, binascii.Error, ValueError):
            raise ValueError(f"{where} is not base64") from None
    if isinstance(value, dict):
        content = value.get("bytes")
        # Hugging Face's form of a picture: bytes, or a path where none are embedded
        value = value.get("path") if content is None else content
    if isinstance(value, bytes):
        return PictureSegment(value, where, fit)
    # a name for errors; a data: URI would be as long as the picture
    name = where if not isinstance(value, str) or value.startswith("data:") else value
    return PictureSegment(read_picture(value), name, fit)
