"""Tensors as they stand in files, named by what the files say, also in files that are cut off.

The safetensors library refuses a damaged file as a whole. People inspect a checkpoint because something is wrong with
it, so here the header is read for itself, and each tensor that lies in the file is readable.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""Types as torch and our own index call them."""
LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library has the same limit."""
LARGEST_AXIS = 1 << 48
MOST_AXES = 32
SAID = 3
"""Problems of one kind that are told in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawTensor:
    """A tensor of a file."""

    name: str
    shape: Shape
    dtype: torch.dtype
    begin: int = 0
    """First byte in the file."""
    problem: str = ""
    """Why it cannot be read; empty: it can."""

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class RawFile(Protocol):
    """A file of tensors."""

    path: Path
    problems: tuple[str, ...]
    """What is wrong with the file, a line each; those of single tensors stand with them too."""

    @property
    def tensors(self) -> Mapping[str, RawTensor]:
        """By name."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Plain values beside the tensors."""
        ...

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a box of it, in its own dtype, in memory that nothing else uses.

        Raises:
            ValueError: it cannot be read.
        """
        ...


class SafetensorsFile:
    """A safetensors file of which the header is read, and nothing else until it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, RawTensor] = {}
        self.metadata: dict[str, Any] = {}
        self._size = path.stat().st_size
        try:
            entries, self._start = _read_header(path, self._size)
        except ValueError as error:
            self.problems: tuple[str, ...] = (str(error),)
            return
        found = entries.pop("__metadata__", {})
        self.metadata = found if isinstance(found, dict) else {}
        ranges: list[tuple[int, int, str]] = []
        refused = []
        for name, entry in entries.items():
            try:
                tensor, end = self._tensor(name, entry)
            except (ValueError, KeyError, TypeError) as error:
                refused.append(f"{name!r}: {error}")
                continue
            self.tensors[name] = tensor
            ranges.append((tensor.begin, end, name))
        self.problems = tuple(self._problems(sorted(ranges), refused))

    def _tensor(self, name: str, entry: dict[str, Any]) -> tuple[RawTensor, int]:
        """A tensor and the byte behind it.

        Raises:
            ValueError, KeyError, TypeError: the entry contradicts itself.
        """
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if any(type(n) is not int or not 0 <= n <= LARGEST_AXIS for n in (*shape, begin, end)):
            raise ValueError("its shape or place is not of sensible whole numbers")
        if len(shape) > MOST_AXES:
            raise ValueError(f"has {len(shape)} axes")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"is of the unknown type {entry['dtype']!r}")
        tensor = RawTensor(name=name, shape=shape, dtype=DTYPES[entry["dtype"]], begin=self._start + begin)
        if tensor.num_bytes != end - begin:
            raise ValueError(f"lies about its size: {list(shape)} {entry['dtype']} in {end - begin:,} bytes")
        # Not refused: this is what people want to see of a file that is cut off.
        if self._start + end > self._size:
            missing = min(self._start + end - self._size, tensor.num_bytes)
            problem = f"{missing:,} of its {tensor.num_bytes:,} bytes lie behind the end of {self.path.name}"
            tensor = RawTensor(name=name, shape=shape, dtype=tensor.dtype, begin=self._start + begin, problem=problem)
        return tensor, self._start + end

    def _problems(self, ranges: list[tuple[int, int, str]], refused: list[str]) -> Iterable[str]:
        name, end = self.path.name, max((end for _, end, _ in ranges), default=self._start)
        if end > self._size:
            cut = sum(1 for tensor in self.tensors.values() if tensor.problem)
            yield f"{name}: truncated: {self._size:,} of {end:,} bytes; {cut} of {len(ranges)} tensors are cut off"
        elif end < self._size:
            yield f"{name}: {self._size - end:,} bytes behind the last tensor that belong to none"
        edges = zip([self._start, *(end for _, end, _ in ranges)], ranges, strict=False)
        if any(before != begin for before, (begin, _, _) in edges):
            yield f"{name}: tensors overlap, or there are gaps between them"
        if refused:
            yield f"{name}: {len(refused)} entries are no tensors: {listed(refused)}"

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """See `RawFile`; of a box, the rows from its first to its last are read."""
        tensor = self.tensors[name]
        if tensor.problem:
            raise ValueError(f"{self.path}: {name}: {tensor.problem}")
        axes = part if part is not None else tuple(slice(0, n) for n in tensor.shape)
        # Leading axes of length 1 are skipped, so that a box of a stacked tensor reads its rows alone.
        first = next((i for i, n in enumerate(tensor.shape) if n != 1), 0)
        inner = tensor.shape[first + 1 :]
        rows = axes[first] if axes else slice(0, 1)
        row = math.prod(inner) * tensor.dtype.itemsize
        buffer = self._bytes(tensor.begin + rows.start * row, (rows.stop - rows.start) * row)
        values = buffer.view(tensor.dtype).view((rows.stop - rows.start, *inner))
        return values[(slice(None), *axes[first + 1 :])].reshape([axis.stop - axis.start for axis in axes])

    def _bytes(self, begin: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(begin)
            if file.readinto(buffer.numpy().data) != count:
                raise ValueError(f"{self.path}: became shorter while it was read")
        return buffer


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The entries and where the tensors begin.

    Raises:
        ValueError: there is none, or an impossible one.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= LONGEST_HEADER:
            what = "empty" if not size else f"{size:,} bytes" if size < 8 else f"a header of {length:,} bytes"
            raise ValueError(f"{path.name}: not a safetensors file ({what})")
        if length > size - 8:
            raise ValueError(f"{path.name}: truncated: {size:,} bytes, of a header that has {length:,}")
        text = file.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name}: not a safetensors file (its header is no JSON)") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name}: not a safetensors file (its header is no mapping)")
    return entries, 8 + length


def listed(things: Iterable[str], most: int = SAID) -> str:
    """The first of many, and how many more there are."""
    all_of_them = list(things)
    more = f" and {len(all_of_them) - most:,} more" if len(all_of_them) > most else ""
    return ", ".join(all_of_them[:most]) + more
