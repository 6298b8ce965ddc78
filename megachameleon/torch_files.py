"""Files of `torch.save`, read without unpickling: what they say of their tensors, and parts of the values.

Such a file is a zip of uncompressed entries in one folder: `data.pkl`, a pickle in which a tensor names its storage,
and `data/KEY`, the bytes of that storage. The pickle is followed by a machine that knows the few instructions that
tensors and plain values need, so nothing in it can run, and all that it claims is compared with the entries.
"""

import math
import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Part = tuple[slice, ...]
"""A slice for each axis, each with a start and a stop."""
MOST_PICKLE_BYTES = 16 << 20
"""`data.pkl` of a shard with 600 tensors has 0.1 MB."""
MOST_AXES = 16
MOST_ARGUMENTS = 16
"""Of a call; a pickle can repeat one long list as arguments a million times in a few bytes each."""
MOST = 1 << 48
"""For every number of a tensor, and for numbers that are keys; far above all that files have."""
BLOCK = 1 << 20
"""Bytes that are read at a time where they go to places apart."""
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
FIXED: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
GIVEN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
"""Instructions that push the value which stands beside them."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In values."""
    start: int
    """The file's byte at which its first value begins."""


class _RefusedError(ValueError):
    """Says by itself what is wrong."""


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    start: int
    num_values: int


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle looks up."""

    name: str


_MARK = _Global("")


def read_torch_index(path: Path) -> Any:
    """What was saved, such as a dictionary, with a `TorchTensor` for each tensor; no values are read.

    Raises:
        ValueError: the file is damaged, has objects other than tensors and plain values, or lies about their sizes.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise _RefusedError(
                    "is not a zip file of torch.save; if it is of torch before 1.6, write it again with a later one: "
                    "torch.save(torch.load(FILE, weights_only=True), FILE)"
                )
            entries = _entries(file)
            return _Machine(_storages(entries)).run(_pickle(file, entries))
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path}: cut off, or damaged ({error or type(error).__name__}); copy it again") from None


def read_part(path: Path, tensor: TorchTensor, part: Part, out: Tensor) -> None:
    """Read a part of a tensor's values into `out`, on the CPU, of the part's shape and any dtype.

    Raises:
        ValueError: the file is shorter than it was.
    """
    if not out.numel():
        return
    first = tensor.start + tensor.dtype.itemsize * sum(s.start * n for s, n in zip(part, tensor.stride, strict=True))
    span = 1 + sum((s.stop - s.start - 1) * n for s, n in zip(part, tensor.stride, strict=True))
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < first + span * tensor.dtype.itemsize:
            raise ValueError(f"{path}: has become shorter while it was read; copy it again")
        if _row_major(out.shape, tensor.stride):
            return _read_rows(file, first, tensor.dtype, out)
        # Only the pages of the part are read, which of a few columns are not all.
        page = first // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = first - page + span * tensor.dtype.itemsize
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
        values = torch.frombuffer(pages, dtype=tensor.dtype, count=span, offset=first - page)
        out.copy_(values.as_strided(out.shape, tensor.stride))


def _row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    wanted = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != wanted:
            return False
        wanted *= length
    return True


def _read_rows(file: BinaryIO, start: int, dtype: torch.dtype, out: Tensor) -> None:
    """Read values that stand end to end, straight into `out` or by way of a block that stays in the cache."""
    if out.dtype == dtype and out.is_contiguous():
        return _fill(file, start, out)
    rows = out if out.dim() else out.view(1)
    size = dtype.itemsize * math.prod(rows.shape[1:])
    count = min(max(BLOCK // size, 1), len(rows))
    block = torch.empty((count, *rows.shape[1:]), dtype=dtype)
    for first in range(0, len(rows), count):
        target = rows[first : first + count]
        _fill(file, start + first * size, block[: len(target)])
        target.copy_(block[: len(target)])


def _fill(file: BinaryIO, start: int, values: Tensor) -> None:
    memory = values.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(memory):  # the system reads at most 2 GiB in one go
        count = os.preadv(file.fileno(), [memory[done:]], start + done)
        if not count:
            raise ValueError(f"{file.name}: has become shorter while it was read; copy it again")
        done += count


def _entries(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """First byte and size of all entries, by names without the folder that they share."""
    found: dict[str, tuple[int, int]] = {}
    spans = []
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    root = infos[0].filename.split("/")[0] + "/" if infos else ""
    for info in infos:
        name = info.filename
        if name != info.orig_filename or "\\" in name or not name.startswith(root) or ".." in name.split("/"):
            raise _RefusedError(f"the zip has an entry {name!r} outside the folder {root!r}; take another copy")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise _RefusedError(f"the zip's entry {name!r} is compressed or encrypted, and torch.save does neither")
        if name.removeprefix(root) in found:
            raise _RefusedError(f"the zip has two entries {name!r}; take another copy")
        start = _first_byte(file, info)
        found[name.removeprefix(root)] = start, info.file_size
        spans.append((info.header_offset, start + info.file_size, name))
    spans.sort()
    limits = [start for start, _, _ in spans[1:]] + [archive.start_dir]
    for (_, end, name), limit in zip(spans, limits, strict=True):
        if end > limit:
            raise _RefusedError(f"the zip's entry {name!r} reaches into what follows it; copy the file again")
    return found


def _first_byte(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, by the header that stands before them."""
    file.seek(info.header_offset)
    header = file.read(30)
    name, more = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if len(header) < 30 or header[:4] != b"PK\x03\x04" or file.read(name) != info.orig_filename.encode():
        raise _RefusedError(f"the zip's entry {info.filename!r} is not where the zip says; copy the file again")
    return info.header_offset + 30 + name + more


def _pickle(file: BinaryIO, entries: dict[str, tuple[int, int]]) -> bytes:
    start, size = entries.get("data.pkl", (0, 0))
    if not size:
        raise _RefusedError("has no data.pkl, so torch.save has not written it; take another copy")
    if size > MOST_PICKLE_BYTES:
        raise _RefusedError(f"data.pkl has {size:,} bytes, more than {MOST_PICKLE_BYTES:,}; it holds more than weights")
    if "byteorder" in entries:
        file.seek(entries["byteorder"][0])
        if file.read(min(entries["byteorder"][1], 16)) != b"little":
            raise _RefusedError("was written by a big-endian machine; write it again on one with little-endian numbers")
    file.seek(start)
    return file.read(size)


def _storages(entries: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name.removeprefix("data/"): place for name, place in entries.items() if name.startswith("data/")}


class _Machine:
    """Follows a pickle without looking up or calling anything that it names."""

    def __init__(self, storages: dict[str, tuple[int, int]]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._rebuilds: dict[str, Callable[..., Any]] = {
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_parameter": lambda data, *_: data,
            "collections OrderedDict": lambda: {},
            "torch Size": self._size,
        }

    def run(self, pickle: bytes) -> Any:
        """What the pickle holds."""
        for code, argument, _ in pickletools.genops(pickle):
            if code.name == "STOP":
                break
            self._step(code.name, argument)
        (value,) = self._stack
        return value

    def _step(self, code: str, argument: Any) -> None:
        stack = self._stack
        if code in FIXED:
            stack.append(FIXED[code])
        elif code in GIVEN:
            stack.append(argument)
        elif code in TUPLES:
            stack[-TUPLES[code] :] = [tuple(stack[-TUPLES[code] :])]
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if code == "MEMOIZE" else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif code in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._add(code)
        elif code not in ("PROTO", "FRAME"):
            self._build(code, argument)

    def _build(self, code: str, argument: Any) -> None:
        stack = self._stack
        if code == "MARK":
            stack.append(_MARK)
        elif code == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif code in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if code == "EMPTY_DICT" else [])
        elif code == "GLOBAL":
            stack.append(self._known(argument))
        elif code == "STACK_GLOBAL":
            name = stack.pop()
            stack.append(self._known(f"{stack.pop()} {name}"))
        elif code == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif code == "REDUCE":
            arguments = stack.pop()
            if len(arguments) > MOST_ARGUMENTS:
                raise _RefusedError(f"data.pkl has a call with {len(arguments):,} arguments; tensors need a few")
            stack.append(self._rebuilds[stack.pop().name](*arguments))
        elif code == "BUILD" and isinstance(stack[-2], dict):
            stack.pop()  # attributes of an OrderedDict: versions of modules
        else:
            raise _RefusedError(f"data.pkl has the instruction {code}, which tensors do not need; nothing was executed")

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _add(self, code: str) -> None:
        count = 2 if code == "SETITEM" else 1
        items = self._since_mark() if code.endswith("S") else [self._stack.pop() for _ in range(count)][::-1]
        target = self._stack[-1]
        if code.startswith("APPEND"):
            target.extend(items)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # a tuple of tuples may take forever to be hashed
                raise _RefusedError(f"data.pkl has a key of type {type(key).__name__}; only names and numbers are read")
            if isinstance(key, int) and abs(key) >= MOST:  # those with equal hashes could be chosen
                raise _RefusedError(f"data.pkl has a key of {key.bit_length()} bits; take another copy")
            target[key] = value

    def _known(self, name: str) -> _Global:
        module, _, attribute = name.partition(" ")
        if name not in self._rebuilds and not (module == "torch" and attribute in STORAGES):
            raise _RefusedError(
                f"holds an object of {module[:99]}.{attribute[:99]}, and only tensors and plain values are read; "
                "nothing of it was executed. Take the file from its publisher, or save its tensors alone"
            )
        return _Global(name)

    def _storage(self, kind: str, dtype: _Global, key: str, _location: str, num_values: int) -> _Storage:
        # Types first: to hash or to print a tuple of tuples of tuples may take forever.
        if kind != "storage" or type(key) is not str or type(num_values) is not int:
            raise _RefusedError("data.pkl describes a storage as torch never does; take another copy")
        start, size = self._storages.get(key, (0, -1))
        value = STORAGES[dtype.name.removeprefix("torch ")]
        if size < 0 or num_values * value.itemsize != size:
            raise _RefusedError(
                f"data.pkl says that storage {key!r} has {num_values} values of {value.itemsize} bytes, and the zip's "
                f"entry has {max(size, 0):,} bytes; copy the file again"
            )
        return _Storage(value, start, num_values)

    def _size(self, lengths: Any) -> tuple[Any, ...]:
        if len(lengths) > MOST_AXES:
            raise _RefusedError(f"data.pkl has the shape of a tensor with {len(lengths):,} axes; take another copy")
        return tuple(lengths)

    def _tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> TorchTensor:
        numbers = (offset, *shape, *stride)
        if any(type(n) is not int for n in numbers):
            raise _RefusedError("a tensor whose shape, strides or offset are no whole numbers cannot be")
        # Of no values, too: torch computes with all lengths and strides as 64 bits hold them.
        most = max(*numbers, math.prod(max(n, 1) for n in shape[:MOST_AXES]))
        if len(shape) != len(stride) or len(shape) > MOST_AXES or min(numbers) < 0 or most >= MOST:
            raise _RefusedError(f"a tensor of shape {shape} and strides {stride} at {offset} cannot be")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else 0
        if count and (last >= storage.num_values or count > storage.num_values):
            raise _RefusedError(
                f"a tensor of shape {list(shape)}, strides {list(stride)} and offset {offset} does not fit into its "
                f"storage of {storage.num_values} values; copy the file again"
            )
        start = storage.start + offset * storage.dtype.itemsize
        return TorchTensor(storage.dtype, tuple(shape), tuple(stride), start)
