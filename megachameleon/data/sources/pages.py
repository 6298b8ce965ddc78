"""A page as an interleaved document: paragraphs and the pictures that lie beside it, in reading order.

A picture is followed by its alternative text. One that is not to be had offline (a URL, an SVG) gives that text alone,
as a browser without network would; one that should be there and is not, or lies outside the folder, is an error.
"""

import posixpath
import re
from urllib.parse import unquote

from megachameleon.data.records import PictureSegment, Segment, TextSegment, checked_text
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.tokens.pictures import PICTURE_SUFFIXES

MAX_PAGE_BYTES = 1 << 23
"""Longest page; parsers need many times its bytes, and time that may grow with their square."""
_SUFFIXES = (*PICTURE_SUFFIXES, ".gif", ".bmp")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|//")


class PageBuilder:
    """Collects paragraphs and pictures."""

    def __init__(self, beside: FilesBeside) -> None:
        self._beside = beside
        self._parts: list[str | PictureSegment] = []
        self._alternative = ""

    def add_text(self, text: str) -> None:
        """Add a paragraph, unless it says what the picture before it did."""
        if not text.strip():
            return
        # captions under pictures often repeat the alternative text
        if text != self._alternative:
            self._parts.append(text)
        self._alternative = ""

    def add_picture(self, reference: str, alternative: str) -> None:
        """Add the picture that a page refers to, and its alternative text.

        Raises:
            ValueError: it should lie beside the page and does not.
        """
        picture = self._picture(reference.strip())
        if picture is not None:
            self._parts.append(picture)
        if alternative := " ".join(alternative.split()):
            self._parts.append(alternative)
            self._alternative = alternative

    def segments(self) -> tuple[Segment, ...]:
        """The whole page.

        Raises:
            ValueError: there is nothing on it.
        """
        segments: list[Segment] = []
        paragraphs: list[str] = []
        for part in [*self._parts, None]:
            if isinstance(part, str):
                paragraphs.append(part)
                continue
            if paragraphs:
                segments.append(TextSegment(checked_text("\n\n".join(paragraphs), "text")))
                paragraphs = []
            if part is not None:
                segments.append(part)
        if not segments:
            raise ValueError("a page without text or pictures")
        return tuple(segments)

    def _picture(self, reference: str) -> PictureSegment | None:
        if re.match(r"data:image/(png|jpe?g|webp|gif|bmp)[;,]", reference, re.IGNORECASE):
            return PictureSegment(self._beside.read("data:" + reference[5:]), "data: URI")
        if not reference or _ELSEWHERE.match(reference):
            return None
        # pages that were saved keep the query behind names
        name = unquote(re.split("[?#]", reference)[0], errors="strict")
        # such as SVG, which would have to be drawn first
        if posixpath.splitext(name)[1].lower() not in _SUFFIXES:
            return None
        return PictureSegment(self._beside.read(name), name)
