"""Files written from beginning to end: hashed and made durable on the way; safetensors files tensor by tensor."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megachameleon.checkpoint.formats.plain import Digests, Piece
from megachameleon.checkpoint.snapshot import KINDS

STRIDE = 8 << 20
"""Bytes that are hashed and written at a time."""
DIRECT = getattr(os, "O_DIRECT", 0)


def file_order(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Wide types first, so that each tensor begins at a multiple of its type's size."""
    return tuple(sorted(pieces, key=lambda piece: -piece.dtype.itemsize))


class DurableFile:
    """A file that is written in one go; on the disk for good once it is closed.

    What is given is copied into one of two buffers; what is in the other one is hashed and written meanwhile. Where the
    file system can, it is written past the page cache: filling the cache with what nobody reads soon costs more time
    than the disk needs.
    """

    def __init__(self, path: Path, algorithms: Sequence[str] = ("sha256",)) -> None:
        """
        Args:
            algorithms: hashes to be computed, as `hashlib.new` calls them.

        Raises:
            OSError: it cannot be written; here and in every other method.
        """
        self._hashes = {name: hashlib.new(name) for name in algorithms}
        self._descriptor, self._direct = _open(path)
        self._threads = ThreadPoolExecutor(len(self._hashes))
        self._buffers = [mmap.mmap(-1, STRIDE) for _ in range(2)]  # begin at a page, as O_DIRECT wants it
        self._running: list[Future] = []
        self._current = self._filled = 0
        self.size = 0
        """Bytes so far."""

    def write(self, data: bytes | memoryview) -> None:
        """Append; `data` (bytes) may be changed as soon as this returns."""
        view = memoryview(data)
        while view:
            part = view[: STRIDE - self._filled]
            end = self._filled + len(part)
            self._buffers[self._current][self._filled : end] = part
            self._filled = end
            if end == STRIDE:
                self._flush()
            view = view[len(part) :]
            self.size += len(part)

    def digests(self) -> Digests:
        """Of all that was written, after the file is closed."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._wait()
                os.fsync(self._descriptor)
        finally:
            self._threads.shutdown()
            os.close(self._descriptor)

    def _flush(self) -> None:
        """Let the current buffer be written, once the other one is, and go on with the other one."""
        # The other buffer is about to be filled, so nothing may be reading it any more.
        self._wait()
        data = memoryview(self._buffers[self._current])[: self._filled]
        first, *others = self._hashes.values()
        self._running = [self._threads.submit(self._put, data)]
        self._running += [self._threads.submit(digest.update, data) for digest in others]
        first.update(data)  # here, where it is in the cache
        self._current, self._filled = 1 - self._current, 0

    def _wait(self) -> None:
        for future in self._running:
            future.result()

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                # What is left at the end is no whole block, or the file system wants other blocks than a page.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
                self._direct = False


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it writes past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o666), bool(DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666), False


def write_safetensors(path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
    """Write a file and make it durable; only one tensor is needed in memory at a time.

    Args:
        pieces: names, shapes and types in `file_order`.
        tensors: their values, in the same order.

    Returns:
        The file's `sha256`.

    Raises:
        OSError: it cannot be written; what there is of it is left.
    """
    with DurableFile(path) as file:
        file.write(_header(pieces))
        left = iter(tensors)
        for piece in pieces:
            write_blocks(piece, left, file.write)
        assert next(left, None) is None
    return file.digests()


def write_blocks(piece: Piece, tensors: Iterator[Tensor], write: Callable[[memoryview], object]) -> None:
    """Give the bytes of the next tensors to `write`, up to the end of a piece, in its order of rows."""
    missing = piece.num_bytes
    while True:
        data = _bytes_of(next(tensors), piece)
        write(data)
        missing -= len(data)
        del data  # the next tensor is made when nothing is left of this one
        assert missing >= 0, piece.name
        if not missing:
            return


def _bytes_of(tensor: Tensor, piece: Piece) -> memoryview:
    assert (tensor.dtype, tensor.shape[-1:]) == (piece.dtype, piece.shape[-1:]), piece.name
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers opens no file without it
    begin = 0
    for piece in pieces:
        end = begin + torch.Size(piece.shape).numel() * piece.dtype.itemsize
        entries[piece.name] = {"dtype": KINDS[piece.dtype], "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
