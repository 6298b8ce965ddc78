"""The kinds of sources: which names they have, how their records are found, understood and counted.

A new kind is a file of this package with a reader, a parser and a counter, and an entry here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO

import megachameleon.data.sources.folder as folder
import megachameleon.data.sources.html as html
import megachameleon.data.sources.jsonl as jsonl
import megachameleon.data.sources.markdown as markdown
import megachameleon.data.sources.parquet as parquet
import megachameleon.data.sources.tar as tar
import megachameleon.data.sources.text as text
from megachameleon.data.records import Record
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.locations import base_name
from megachameleon.data.sources.raw import RawRecord


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One kind of source."""

    suffixes: tuple[str, ...]
    """Names that end so, or so and `.gz` or `.zst`; none for folders."""
    read: Callable[[str, BinaryIO], Iterator[RawRecord]]
    """Finds the records of a source in its unpacked content."""
    parse: Callable[[RawRecord, FilesBeside], Record]
    """Understands one, or raises ValueError with the reason."""
    count: Callable[[RawRecord], tuple[int, int] | None]
    """(bytes of text, pictures) of one; None if that needs `parse`."""
    packed: bool = True
    """Whether it may be packed with gzip or zstd."""
    short: tuple[str, ...] = ()
    """Further suffixes, of packed ones."""

    @property
    def all_suffixes(self) -> tuple[str, ...]:
        """Every suffix, in lower case."""
        packing = ("", ".gz", ".zst") if self.packed else ("",)
        return tuple(suffix + packed for suffix in self.suffixes for packed in packing) + self.short


KINDS: Mapping[str, SourceKind] = MappingProxyType({
    "tar": SourceKind((".tar",), tar.read_raw_tar, tar.parse_raw_tar, tar.count_raw_tar, short=(".tgz", ".tzst")),
    "jsonl": SourceKind((".jsonl", ".ndjson"), jsonl.read_raw_jsonl, jsonl.parse_raw_jsonl, jsonl.count_raw_jsonl),
    "parquet": SourceKind(
        (".parquet",), parquet.read_raw_parquet, parquet.parse_raw_parquet, parquet.count_raw_parquet, packed=False
    ),
    "html": SourceKind((".html", ".htm"), html.read_raw_html, html.parse_raw_html, lambda raw: None),
    "markdown": SourceKind(
        (".md", ".markdown"), markdown.read_raw_markdown, markdown.parse_raw_markdown, lambda raw: None
    ),
    "text": SourceKind((".txt",), text.read_raw_text, text.parse_raw_text, text.count_raw_text),
    "folder": SourceKind((), folder.read_raw_folder, folder.parse_raw_folder, lambda raw: None, packed=False),
})  # fmt: skip

KNOWN_SUFFIXES = tuple(suffix for kind in KINDS.values() for suffix in kind.all_suffixes)


def kind_of_source(source: str) -> str:
    """Which kind a source is of, by its name; what has no known suffix is a folder of pictures."""
    name = base_name(source).lower()
    return next((name_of for name_of, kind in KINDS.items() if name.endswith(kind.all_suffixes)), "folder")
