"""A rank's share of the state, copied to host memory at once and written to its file from there.

The copy is laid out as the file will be, so writing makes no second one: safetensors is a length, a header in JSON and
the bytes of the tensors end to end.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megachameleon.checkpoint.tensors import StoredTensor

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""Names in safetensors' header, by torch's type."""
PIECE = 8 << 20
"""Bytes that are hashed and written at a time."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Tensors in the order of their file."""

    tensors: tuple[StoredTensor, ...]
    """Their `data` is host memory, or live tensors (`live_snapshot`)."""
    copied: Any = None
    """A CUDA event after which the copies are there; None: they are, or nothing was copied."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(item.data.nbytes for item in self.tensors)


class HostMemory:
    """Memory of the host that snapshots share, one after the other; as large as the largest of them.

    The bytes of a checkpoint that this rank writes: for a bf16 run about 14 a parameter, divided over all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: where training computes; for CUDA the memory is pinned, so that copies need no processor."""
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Held until the end of the run."""
        return len(self._memory)

    @torch.no_grad()
    def copy(self, tensors: Iterable[StoredTensor]) -> Snapshot:
        """Copy tensors; training may change them as soon as this has returned.

        On CUDA the copy is only queued, before all kernels that are queued later; the host does not wait for it. What
        the snapshot before this one holds is overwritten.
        """
        ordered = file_order(tensors)
        self._reserve(sum(item.data.nbytes for item in ordered))
        copies, begin = [], 0
        for item in ordered:
            end = begin + item.data.nbytes
            place = self._memory[begin:end].view(item.data.dtype).view(item.data.shape)
            # asynchronous only because the memory is registered; on CPU it is an ordinary copy
            place.copy_(item.data, non_blocking=True)
            copies.append(replace(item, data=place))
            begin = end
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return Snapshot(tensors=tuple(copies), copied=copied)

    def _reserve(self, num_bytes: int) -> None:
        if len(self._memory) >= num_bytes:
            return
        cuda = self.device.type == "cuda"
        if cuda and len(self._memory):
            # before the memory goes: CUDA would keep its pages locked
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        if cuda:
            # Not pin_memory=True, which rounds up to a power of two: 9 GB would take 16.
            torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), num_bytes, 0)


def live_snapshot(tensors: Iterable[StoredTensor]) -> Snapshot:
    """The tensors themselves, to be written before training goes on; each is copied only while it is written."""
    return Snapshot(tensors=file_order(tensors))


def file_order(tensors: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Wide types first, so that each tensor begins at a multiple of its type's size."""
    return tuple(sorted(tensors, key=lambda item: -item.data.element_size()))


def write_snapshot(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write a safetensors file and make it durable; returns its `size` and `sha256`.

    Neither hashing nor writing of large pieces holds Python's lock, so training runs on beside it.

    Raises:
        OSError: it cannot be written; what there is of it is left.
    """
    if snapshot.copied is not None:
        # in the writer's thread: the event is the only thing that it waits for on the device
        snapshot.copied.synchronize()
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in _pieces(snapshot.tensors):
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        # durable before anyone is told: a record must not outlive its file
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _pieces(tensors: Sequence[StoredTensor]) -> Iterator[memoryview | bytes]:
    yield _header(tensors)
    for item in tensors:
        if item.data.nbytes:
            flat = item.data.detach().contiguous().cpu().view(-1).view(torch.uint8)
            values: memoryview = flat.numpy().data
            yield from (values[start : start + PIECE] for start in range(0, len(values), PIECE))


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    entries: dict[str, dict[str, Any]] = {}
    begin = 0
    for item in tensors:
        end = begin + item.data.nbytes
        assert item.data.dtype in KINDS, f"{item.name}: {item.data.dtype} has no name in safetensors yet"
        shape = list(item.data.shape)
        entries[item.name] = {"dtype": KINDS[item.data.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # spaces, as safetensors itself pads, so that values begin aligned
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def available_memory() -> int | None:
    """Bytes that processes of this host may still take, by its kernel and the limit of this job; None: unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        with contextlib.suppress(OSError, ValueError):  # of version 2; "max" where there is no limit
            group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].strip("/")
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            free.append(limit - used)
        return min(free, default=None)
    return None
