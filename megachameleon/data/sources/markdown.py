"""Markdown: its source as it is written, cut where pictures stand that lie beside the file."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from megachameleon.data.records import Record, SegmentsRecord, decode_text
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.pages import MAX_PAGE_BYTES, PageBuilder
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.text import read_whole

_TAGS = re.compile(r"""<!--.*?(?:-->|\Z)|<img\b(?:=\s*"[^"]*"|=\s*'[^']*'|[^<>])*+>""", re.IGNORECASE | re.DOTALL)
"""A `<` ends the search for the end of a tag, but in quotes: without it, time would grow with the square."""
_ATTRIBUTE = re.compile(r"""\b(src|alt)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)
_EMPTY_LINES = re.compile(r"\A(?:[ \t]*\n)+")
_REST_OF_LINK = re.compile(r"\]\([^()\n]*\)")


@dataclass(frozen=True, slots=True)
class _Picture:
    line: int
    """Of the block it stands in."""
    markup: str
    reference: str
    alternative: str


def read_raw_markdown(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """A Markdown file, unpacked as `file`."""
    return read_whole(source, "markdown", file, MAX_PAGE_BYTES)


def parse_raw_markdown(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a Markdown file.

    Raises:
        ValueError: not UTF-8, without content, or a picture is not beside it.
    """
    try:
        text = decode_text(raw.payload)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 (at its byte {error.start})") from None
    # as CommonMark does, so that positions in the parser's text and in ours agree
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    page = PageBuilder(beside)
    done = 0
    for picture, start, end in _located(text, _pictures(text)):
        page.add_text(_trimmed(text, done, start))
        page.add_picture(picture.reference, picture.alternative)
        done = end
    page.add_text(_trimmed(text, done, len(text)))
    return SegmentsRecord(raw.place, page.segments())


def _trimmed(text: str, start: int, end: int) -> str:
    """A stretch without empty lines around it; a first line keeps its indent, the rest of one does not."""
    piece = _EMPTY_LINES.sub("", text[start:end]).rstrip()
    whole_line = start == 0 or len(piece) < len(text[start:end].rstrip())
    return piece if whole_line else piece.lstrip()


def _pictures(text: str) -> list[_Picture]:
    # most pages have no pictures and need no parser
    if "![" not in text and "<img" not in text.lower():
        return []
    try:
        from markdown_it import MarkdownIt
        from markdown_it.rules_inline.image import image
    except ImportError:
        raise ValueError("reading Markdown needs the package markdown-it-py; pip install markdown-it-py") from None

    # the parser gives a picture's address and text, but not where its markup stands
    def image_with_markup(state: Any, silent: bool) -> bool:
        start = state.pos
        found = image(state, silent)
        if found and not silent:
            state.tokens[-1].meta["markup"] = state.src[start : state.pos]
        return found

    parser = MarkdownIt("commonmark").enable("table")
    parser.inline.ruler.at("image", image_with_markup)
    try:
        return list(_pictures_of(parser.parse(text)))
    except RecursionError:
        raise ValueError("Markdown is nested too deeply") from None


def _pictures_of(tokens: Sequence[Any]) -> Iterator[_Picture]:
    line = 0
    for token in tokens:
        line = token.map[0] if token.map else line
        if token.type == "html_block":
            yield from _tagged(line, token.content)
        for child in token.children or ():
            if child.type == "image":
                yield _Picture(line, child.meta["markup"], str(child.attrs.get("src", "")), child.content)
            elif child.type == "html_inline":
                yield from _tagged(line, child.content)


def _tagged(line: int, html: str) -> Iterator[_Picture]:
    from html import unescape

    for tag in _TAGS.findall(html):
        if not tag.startswith("<!--"):
            values = {name.lower(): unescape(a or b or c) for name, a, b, c in _ATTRIBUTE.findall(tag)}
            yield _Picture(line, tag, values.get("src", ""), values.get("alt", ""))


def _located(text: str, pictures: Sequence[_Picture]) -> Iterator[tuple[_Picture, int, int]]:
    """Where the markup of each picture stands, with the link around it."""
    lines = [0, *(match.end() for match in re.finditer("\n", text))]
    done = 0
    for picture in pictures:
        # within quotes and lists, the lines of a block begin with marks that its content is without
        pattern = r"\n[ \t>]*".join(re.escape(part) for part in picture.markup.split("\n"))
        match = re.compile(pattern).search(text, max(done, lines[min(picture.line, len(lines) - 1)]))
        if match is None:
            raise ValueError(f"picture {picture.reference[:80]!r} cannot be located; write it on a line of its own")
        start, end = match.span()
        rest = _REST_OF_LINK.match(text, end)
        # a picture that is a link: what is left of the link would be stray brackets
        if rest is not None and text[start - 1 : start] == "[":
            start, end = start - 1, rest.end()
        yield picture, start, end
        done = end
