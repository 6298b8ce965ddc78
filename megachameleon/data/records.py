"""What raw sources hold: text, captioned pictures and interleaved documents; and records that had to be set aside."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Fit = Literal["crop", "pad"]
"""How a picture becomes a square: its middle cut out, or a border added."""
QUOTED = 500
"""Characters at the beginning and at the end that are kept of what is said of a bad record, which may quote it."""


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A stretch of text."""

    text: str


@dataclass(frozen=True, slots=True)
class PictureSegment:
    """An encoded picture, such as the bytes of a PNG file."""

    data: bytes
    origin: str
    """Its name within the record, for errors."""
    fit: Fit = "crop"
    content_hash: str = field(init=False)
    """The SHA-256 of `data`, in hexadecimal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "content_hash", hashlib.sha256(self.data).hexdigest())


Segment = TextSegment | PictureSegment


@dataclass(frozen=True, slots=True)
class Caption:
    """One description of a picture."""

    text: str
    language: str | None = None
    """As the source spells it, such as `en`; None if it does not say."""


@dataclass(frozen=True, slots=True)
class SegmentsRecord:
    """Text and pictures in reading order; plain text is one segment."""

    origin: str
    """Place in its source: `line 3, byte 120`, `KEY, byte 1536`, `row group 0, row 5`."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class CaptionedRecord:
    """A picture with one or more captions."""

    origin: str
    """Place in its source."""
    picture: PictureSegment
    captions: tuple[Caption, ...]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot become a document."""

    file: str
    """Path or name of its source."""
    place: str
    """Place in its source."""
    reason: str
    """What is wrong with it, in words."""

    def __post_init__(self) -> None:
        for name in ("file", "place", "reason"):  # names in tars may hold what no file of text can
            text = getattr(self, name)
            if len(text) > 2 * QUOTED:
                text = f"{text[:QUOTED]}...{text[-QUOTED:]}"
            text = text.encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, text)


Record = SegmentsRecord | CaptionedRecord


def decode_text(data: bytes) -> str:
    """UTF-8 without the mark (BOM) that some editors put in front.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    return data.decode("utf-8").removeprefix("\ufeff")


def kind_of(value: Any) -> str:
    """What a value of JSON is, in plain words."""
    # bool has an entry of its own, though Python takes it for an int
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def checked_text(value: Any, what: str) -> str:
    """A text that is not empty and is valid Unicode.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind_of(value)}, not text")
    if not value or value.isspace():
        raise ValueError(f"{what} is empty")
    try:
        # ASCII, known without a look at the characters, can have no surrogates; the rest is tried by encoding
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode (lone surrogates)") from None
    return value


def parse_captions(values: dict[str, Any]) -> tuple[Caption, ...]:
    """The captions of `{"captions": [{"lang", "text"} or text, ...]}` or `{"caption": text}`; () if there are none.

    Raises:
        ValueError: they have another form.
    """
    if "caption" in values:
        return (Caption(checked_text(values["caption"], "caption")),)
    entries = values.get("captions", [])
    if not isinstance(entries, list):
        raise ValueError("captions is not a list")
    return tuple(_caption(entry, f"captions[{number}]") for number, entry in enumerate(entries))


def _caption(entry: Any, what: str) -> Caption:
    if isinstance(entry, str):
        return Caption(checked_text(entry, what))
    if not isinstance(entry, dict) or not isinstance(entry.get("lang"), str | None):
        raise ValueError(f'{what} is neither text nor {{"lang": ..., "text": ...}}')
    return Caption(checked_text(entry.get("text"), f"{what}.text"), entry.get("lang"))
