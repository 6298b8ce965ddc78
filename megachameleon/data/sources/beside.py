"""Pictures that lie beside the file that refers to them: read within bounds, and remembered for the plan."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from megachameleon.data.sources.locations import file_size, is_url, open_location, resolve_beside
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, too_long

_DATA_URI = re.compile(r"data:image/(png|jpe?g|webp|gif|bmp)((?:;[^;,]*)*),", re.IGNORECASE)


class FilesBeside:
    """Reads the files that one record names; all of them together may have `MAX_RECORD_BYTES`."""

    def __init__(self, folder: str, note: Callable[[str, bytes | None], None] = lambda name, content: None) -> None:
        """
        Args:
            folder: path or URL of the folder of the file that holds the record.
            note: is told each name and the content found there; None if there is none.
        """
        self._folder, self._note = folder, note
        self._left = MAX_RECORD_BYTES

    def read(self, name: object) -> bytes:
        """The content of the file `name`, or of a `data:` URI.

        Raises:
            ValueError: not a name, outside the folder, not there, or too long.
        """
        if not isinstance(name, str):
            raise ValueError(f"image {name!r} is not a file name")
        if name.startswith("data:"):
            return _content_of_uri(name)
        # what a URL gives may be another picture tomorrow, and the same plan would give another shard
        if is_url(name):
            raise ValueError(f"image {name!r} is a URL; pictures are not fetched, save them beside the file")
        path = resolve_beside(self._folder, name)
        size = file_size(path)
        if size is None:
            # noted too, for a picture that appears later makes another shard
            self._note(name, None)
            raise ValueError(f"image {name!r}: no such file beside the file that names it")
        with open_location(path) as file:
            # one byte more than allowed: a server may not tell the size, or a wrong one
            content = file.read(self._left + 1) if size <= self._left else b""
        if max(size, len(content)) > self._left:
            raise ValueError(too_long(f"image {name!r}, with those before it,", max(size, len(content))))
        self._left -= len(content)
        self._note(name, content)
        return content


def found_hash(content: bytes | None) -> str:
    """The SHA-256 of a file's content, in hexadecimal; "missing" if there is no such file."""
    return "missing" if content is None else hashlib.sha256(content).hexdigest()


class ReferenceHash:
    """Remembers what was beside a source, in order, as one hash."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._any = False

    def note(self, name: str, content: bytes | None) -> None:
        """Add a name and what it held."""
        self.add(name, found_hash(content))

    def add(self, name: str, found: str) -> None:
        """Add a name and the `found_hash` of what it held."""
        # a zero byte and a line end, which no name has, keep entries apart
        self._digest.update(f"{name}\0{found}\n".encode("utf-8", "backslashreplace"))
        self._any = True

    def value(self) -> str | None:
        """The hash in hexadecimal; None if nothing was referred to."""
        return self._digest.hexdigest() if self._any else None


def _content_of_uri(uri: str) -> bytes:
    match = _DATA_URI.match(uri)
    if match is None:
        raise ValueError(f"image {uri[:40]!r} is not a data: URI of a PNG, JPEG, WebP, GIF or BMP")
    content = unquote_to_bytes(uri[match.end() :])
    if ";base64" not in match[2].lower():
        return content
    try:
        return base64.b64decode(re.sub(rb"\s", b"", content), validate=True)
    except binascii.Error:
        raise ValueError(f"image {uri[:40]!r} is not base64") from None
