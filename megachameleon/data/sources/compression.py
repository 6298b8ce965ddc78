"""Unpacking gzip and zstd a little at a time, so that a small file that unpacks to a huge one costs no memory."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from megachameleon.data.sources.locations import BUFFER_BYTES, base_name, open_location

GZIP_SUFFIXES = (".gz", ".tgz")
ZSTD_SUFFIXES = (".zst", ".tzst")
_ZSTD_INPUT_BYTES = 1 << 10
"""Packed bytes at a time: zstd gives all they unpack to at once, which is at most about 45,000 times as much."""


@contextmanager
def open_unpacked(source: str) -> Iterator[BinaryIO]:
    """Open a file, unpacking gzip or zstd if its name says so. The stream only goes forwards."""
    with open_location(source) as file, unpacked(file, source) as content:
        yield content


@contextmanager
def unpacked(file: BinaryIO, source: str) -> Iterator[BinaryIO]:
    """The content of an open file, unpacked as the name of its source says."""
    name = base_name(source).lower()
    if name.endswith(GZIP_SUFFIXES):
        with gzip.GzipFile(fileobj=file, mode="rb") as content:
            yield cast(BinaryIO, content)
    elif name.endswith(ZSTD_SUFFIXES):
        with io.BufferedReader(_ZstdReader(file), BUFFER_BYTES) as buffered:
            yield cast(BinaryIO, buffered)
    else:
        yield file


class _ZstdReader(io.RawIOBase):
    """Frames of zstd, one after the other; unlike zstandard's own reader, one that ends early is an error."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise ValueError("reading .zst needs the package zstandard; pip install zstandard") from None
        self._decompressor = zstandard.ZstdDecompressor()
        self._damage = zstandard.ZstdError
        self._file = file
        self._frame = self._decompressor.decompressobj()
        self._frame_begun = False
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._content:
            packed = self._packed or self._file.read(_ZSTD_INPUT_BYTES)
            if not packed:
                if self._frame_begun:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._unpack(packed)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _unpack(self, packed: bytes) -> None:
        try:
            self._content = memoryview(self._frame.decompress(packed))
        except self._damage as error:
            raise EOFError(str(error)) from None
        # even without output so far: a file cut inside a frame's header must be an error
        self._packed, self._frame_begun = b"", True
        if self._frame.eof:
            # parallel compressors write many frames, which decompressobj does not join
            self._packed = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()
            self._frame_begun = False
