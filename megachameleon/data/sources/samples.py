"""Webdataset's samples: files that share a key, in a tar or in a folder.

KEY.png + KEY.txt                    one caption
KEY.png + KEY.json                   {"captions": [{"lang": "en", "text": "..."}, ...]} or {"caption": "..."}
KEY.json + KEY.0.png + KEY.1.png     {"segments": [{"text": "..."}, {"image": "0.png"}, ...]}
KEY.txt, or KEY.json                 text alone, {"text": "..."}
"""

from collections.abc import Mapping

from megachameleon.data.records import (
    Caption,
    CaptionedRecord,
    PictureSegment,
    Record,
    SegmentsRecord,
    TextSegment,
    checked_text,
    decode_text,
    parse_captions,
)
from megachameleon.data.sources.forms import segments_of
from megachameleon.data.sources.json_values import parse_json
from megachameleon.tokens.pictures import PICTURE_SUFFIXES

PICTURE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)

Members = Mapping[str, bytes]
"""Contents by what follows the key in their names: `png`, `0.png`, `txt`, `json`."""


def is_picture(extension: str) -> bool:
    """Whether `0.png` or `a/b.png` names a picture."""
    return extension.rpartition(".")[2].lower() in PICTURE_EXTENSIONS


def sample_record(origin: str, key: str, members: Members) -> Record:
    """Make a record of the files of one key.

    Raises:
        ValueError: they are of no known form.
    """
    values = parse_json(members["json"]) if "json" in members else {}
    base = key.rpartition("/")[2]
    pictures = {name: PictureSegment(data, f"{base}.{name}") for name, data in members.items() if is_picture(name)}
    if "segments" in values:
        return SegmentsRecord(origin, segments_of(values["segments"], lambda name: _member(pictures, name)))
    captions = parse_captions(values) or _text_caption(members)
    if not captions and "text" in values:
        captions = (Caption(checked_text(values["text"], "text")),)
    if pictures:
        return _captioned(origin, pictures, captions)
    if "text" in values:
        return SegmentsRecord(origin, (TextSegment(checked_text(values["text"], "text")),))
    if "txt" in members:
        return SegmentsRecord(origin, (TextSegment(captions[0].text),))
    raise ValueError(f"unknown form: members {sorted(members)} with JSON keys {sorted(values)}")


def _captioned(origin: str, pictures: Mapping[str, PictureSegment], captions: tuple[Caption, ...]) -> Record:
    if len(pictures) != 1:
        raise ValueError(f"several pictures ({', '.join(sorted(pictures))}) but no JSON with segments")
    if not captions:
        raise ValueError("a picture without a caption")
    (picture,) = pictures.values()
    return CaptionedRecord(origin, picture, captions)


def _member(pictures: Mapping[str, PictureSegment], name: object) -> bytes:
    if not isinstance(name, str) or name.lower() not in pictures:
        raise ValueError(f"image {name!r} is not among the sample's members {sorted(pictures)}")
    return pictures[name.lower()].data


def _text_caption(members: Members) -> tuple[Caption, ...]:
    if "txt" not in members:
        return ()
    try:
        return (Caption(checked_text(decode_text(members["txt"]).strip(), "caption")),)
    except UnicodeDecodeError:
        raise ValueError("caption is not valid UTF-8") from None
