"""HTML pages: the text that a reader sees, paragraph by paragraph, and the pictures that lie beside the page."""

import codecs
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from megachameleon.data.records import Record, SegmentsRecord, decode_text
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.pages import MAX_PAGE_BYTES, PageBuilder
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.text import read_whole

_UNSEEN = frozenset([
    "audio", "canvas", "datalist", "head", "iframe", "math", "noscript", "object", "script", "select", "style", "svg",
    "template", "textarea", "video",
])  # fmt: skip
_BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html",
    "main", "nav", "ol", "p", "pre", "section", "summary", "table", "ul",
])  # fmt: skip
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([A-Za-z0-9_-]+)", re.IGNORECASE)
_CHARSETS = re.compile(r"utf-8|ascii|iso8859-\d+|cp125\d|koi8-[ru]|shift_jis|euc_(jp|kr)|gb2312|gbk|gb18030|big5")
_SPACE = re.compile(r"[ \t\n\r\f]+")


def read_raw_html(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """A page, unpacked as `file`."""
    return read_whole(source, "html", file, MAX_PAGE_BYTES)


def parse_raw_html(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a page.

    Raises:
        ValueError: not in its encoding, without content, or a picture is not beside it.
    """
    return SegmentsRecord(raw.place, html_segments(_decoded(raw.payload), PageBuilder(beside)))


def html_segments(text: str, page: PageBuilder) -> tuple:
    """The segments of a page's source."""
    try:
        from lxml import etree
    except ImportError:
        raise ValueError("reading HTML needs the package lxml; pip install lxml") from None
    # events instead of a tree, which takes many times the page's bytes; nothing is fetched
    parser = etree.HTMLParser(target=_Reader(page), no_network=True)
    try:
        for start in range(0, len(text), 1 << 20):
            parser.feed(text[start : start + (1 << 20)].replace("\0", "\ufffd"))
        # closing a parser that was fed nothing is an error in lxml
        if text:
            parser.close()
    except etree.LxmlError as error:
        raise ValueError(f"not a page ({error})") from None
    return page.segments()


class _Reader:
    """Turns the events of the parser into paragraphs."""

    def __init__(self, page: PageBuilder) -> None:
        self._page = page
        self._unseen = self._preformatted = 0
        self._pieces: list[str] = []

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag in _UNSEEN:
            self._unseen += 1
        if self._unseen:
            return
        if tag in _BLOCKS:
            self._end_paragraph()
        if tag == "pre":
            self._preformatted += 1
        elif tag == "br":
            self._pieces.append("\n")
        elif tag == "li":
            self._pieces.append("\n- ")
        elif tag == "img":
            self._end_paragraph()
            self._page.add_picture(attributes.get("src") or "", attributes.get("alt") or "")

    def end(self, tag: str) -> None:
        if tag in _UNSEEN:
            # pages close what they have not opened
            self._unseen = max(0, self._unseen - 1)
        elif not self._unseen:
            if tag in _BLOCKS:
                self._end_paragraph()
            if tag == "pre":
                self._preformatted = max(0, self._preformatted - 1)
            elif tag in ("td", "th"):
                self._pieces.append("\t")
            elif tag == "tr":
                self._pieces.append("\n")

    def data(self, text: str) -> None:
        if not self._unseen:
            self._pieces.append(text if self._preformatted else _SPACE.sub(" ", text))

    def close(self) -> None:
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = "".join(self._pieces)
        self._pieces = []
        if self._preformatted:
            text = text.strip("\n")
        else:
            text = re.sub(r" {2,}", " ", re.sub(r"[ \t]*\n[ \t]*", "\n", text)).strip()
        self._page.add_text(text)


def _decoded(content: bytes) -> str:
    """A page's source, in UTF-8 or the encoding that it declares at its beginning."""
    # HTML's standard looks for the declaration in the first 1,024 bytes
    declared = _CHARSET.search(content[:1024])
    encoding = "utf-8"
    if declared is not None:
        try:
            encoding = codecs.lookup(declared[1].decode()).name
        except LookupError:
            raise ValueError(f"unknown encoding {declared[1].decode()!r}") from None
        # Python has codecs that are no text encodings, and others that pages do not use
        if not _CHARSETS.fullmatch(encoding):
            raise ValueError(f"unknown encoding {encoding!r}")
    try:
        return decode_text(content) if encoding == "utf-8" else content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid {encoding.upper()} (at its byte {error.start})") from None
