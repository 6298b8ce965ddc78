"""A file as `torch.save` writes it, but tensor by tensor: the pickle first, which needs shapes only, then the bytes."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from megachameleon.checkpoint.formats.plain import Digests, Piece
from megachameleon.checkpoint.formats.writing import DurableFile, write_blocks
from megachameleon.torch_files import STORAGES

ALIGNMENT = 64
"""Bytes, as torch has it, so that mapped values begin where a processor's registers load best."""
FOLDER = "archive"
SLICE = 1 << 20
"""Bytes whose checksum is computed while they are in the cache."""
LARGE = 1 << 30
"""Bytes from which on an entry has fields of 64 bits, far from where it must."""
Write = Callable[[memoryview], None]
PADDING = b"FB"
"""Kind of the field that aligns; torch's own."""


def write_torch_file(path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
    """Write a dictionary of tensors and make it durable; equal tensors make equal bytes.

    Args:
        tensors: values of the pieces, in their order; only one is needed in memory at a time.

    Returns:
        The file's `md5`, which is what Meta's checklist has; two hashes would cost more than the disk.

    Raises:
        OSError: it cannot be written; what there is of it is left.
    """
    with DurableFile(path, ("md5",)) as file:
        stream = _Stream(file)
        with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[call-overload]
            _add_bytes(archive, stream, "data.pkl", _pickled(pieces))
            _add_bytes(archive, stream, "byteorder", b"little")
            left = iter(tensors)
            for number, piece in enumerate(pieces):
                fill = partial(write_blocks, piece, left)
                _add(archive, stream, f"data/{number}", piece.num_bytes, fill)
            assert next(left, None) is None
            _add_bytes(archive, stream, "version", b"3\n")
    return file.digests()


class _Stream:
    """What zipfile writes to; it cannot go back, so checksums stand behind the bytes and not in front."""

    def __init__(self, file: DurableFile) -> None:
        self._file = file

    @property
    def position(self) -> int:
        return self._file.size

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""


def _add_bytes(archive: zipfile.ZipFile, stream: _Stream, name: str, data: bytes) -> None:
    _add(archive, stream, name, len(data), lambda write: write(memoryview(data)))


def _add(archive: zipfile.ZipFile, stream: _Stream, name: str, size: int, fill: Callable[[Write], object]) -> None:
    """Append an entry of `size` bytes, which `fill` writes; they begin at a multiple of `ALIGNMENT`."""
    entry = zipfile.ZipInfo(f"{FOLDER}/{name}")  # of 1980, so that equal tensors make equal bytes
    entry.create_system = 3
    large = size > LARGE
    header = 30 + len(entry.filename) + (20 if large else 0) + 4
    padding = -(stream.position + header) % ALIGNMENT
    entry.extra = PADDING + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(entry, "w", force_zip64=large) as target:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), SLICE):
                target.write(data[start : start + SLICE])

        fill(write)


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    num_values: int


@dataclass(frozen=True, eq=False)
class _TensorOf:
    """Pickled as a tensor is."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        stride, step = [], 1
        for length in reversed(self.shape):
            stride.append(step)
            step *= max(length, 1)
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(reversed(stride)), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        (kind,) = (name for name, dtype in STORAGES.items() if dtype == value.dtype)
        return "storage", getattr(torch, kind), value.key, "cpu", value.num_values


def _pickled(pieces: Sequence[Piece]) -> bytes:
    """`data.pkl`: names, shapes and types."""
    state = {}
    for number, piece in enumerate(pieces):
        shape = tuple(piece.shape)
        state[piece.name] = _TensorOf(_Storage(str(number), piece.dtype, torch.Size(shape).numel()), shape)
    target = io.BytesIO()
    _Pickler(target, protocol=2).dump(state)
    return target.getvalue()
