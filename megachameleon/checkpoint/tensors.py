"""Sharded tensors on disk: one safetensors file a rank, and an index that says which part of which tensor it holds.

megatron-core describes a rank's part of a global tensor as a `ShardedTensor` (key, global shape, offset). Writing
stores each part once. Reading fills any other division of the same tensors by copying overlaps, so a checkpoint does
not know the parallel layout that wrote it. safetensors cannot carry code, unlike the pickles of torch's own formats.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A box of a global tensor, stored under `name` in `file`."""

    file: str
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """A global tensor and the parts that cover it."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


Index = dict[str, TensorEntry]


def write_parts(path: Path, sharded: Iterable[Any], file_name: str) -> Index:
    """Write this rank's share of the tensors (main replicas only) and return their entries.

    Args:
        path: where to write now.
        sharded: megatron-core ShardedTensors, and the empty ShardedObjects that stand for extra state of kernels.
        file_name: the name that the file will have in the finished checkpoint.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica

    tensors: dict[str, Tensor] = {}
    index: Index = {}
    for item in sharded:
        if isinstance(item, ShardedObject):
            assert item.data is None, f"{item.key}: extra state of a kernel that this format does not store"
            continue
        if not is_main_replica(item.replica_id):
            continue
        offset, shape = _box(item)
        name = f"{item.key}@{','.join(map(str, offset))}"
        tensors[name] = item.data.detach().reshape(shape).cpu().contiguous()
        part = Part(file=file_name, name=name, offset=offset, shape=shape)
        old = index.get(item.key)
        index[item.key] = TensorEntry(
            shape=tuple(item.global_shape),
            dtype=str(item.dtype).removeprefix("torch."),
            parts=(*(old.parts if old else ()), part),
        )
    # Parameters are views of one gradient-reduction buffer; safetensors stores only tensors that own their memory.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return index


def merge_indexes(indexes: Iterable[Index]) -> Index:
    """The index of all ranks' parts together."""
    merged: Index = {}
    for index in indexes:
        for key, entry in index.items():
            old = merged.get(key)
            parts = (*(old.parts if old else ()), *entry.parts)
            merged[key] = TensorEntry(shape=entry.shape, dtype=entry.dtype, parts=parts)
    return dict(sorted(merged.items()))


def read_part(folder: Path, index: Index, item: Any) -> Tensor | None:
    """Read the box that a ShardedTensor describes, in the shape of its data; None for a ShardedObject.

    Raises:
        ValueError: the checkpoint lacks the tensor, holds it with another shape, or does not cover the box.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    if isinstance(item, ShardedObject):
        return None
    entry = index.get(item.key)
    if entry is None:
        raise ValueError(f"{folder}: has no tensor {item.key}; it belongs to another model")
    if entry.shape != tuple(item.global_shape):
        raise ValueError(
            f"{folder}: tensor {item.key} has shape {list(entry.shape)}, the model needs {list(item.global_shape)}; "
            "use the model configuration saved with the checkpoint"
        )
    offset, shape = _box(item)
    result = torch.empty(shape, dtype=getattr(torch, entry.dtype))
    filled = 0
    for part in entry.parts:
        filled += _copy_overlap(folder, part, offset, result)
    if filled != result.numel():
        raise ValueError(f"{folder}: tensor {item.key} is incomplete ({filled} of {result.numel()} values); damaged")
    return result.reshape(tuple(item.local_shape))


def index_to_json(index: Index) -> dict[str, Any]:
    """Plain values of an index."""
    return {
        key: {
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "parts": [[part.file, part.name, list(part.offset), list(part.shape)] for part in entry.parts],
        }
        for key, entry in index.items()
    }


def index_from_json(values: dict[str, Any], origin: str) -> Index:
    """Rebuild an index; `origin` names the file in errors.

    Raises:
        ValueError: the values are not an index, or a file name leaves the checkpoint's folder.
    """
    try:
        index = {
            key: TensorEntry(
                shape=tuple(value["shape"]),
                dtype=value["dtype"],
                parts=tuple(
                    Part(file=file, name=name, offset=tuple(offset), shape=tuple(shape))
                    for file, name, offset, shape in value["parts"]
                ),
            )
            for key, value in values.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{origin}: not an index of tensors; the checkpoint is damaged") from None
    for entry in index.values():
        for part in entry.parts:
            if Path(part.file).name != part.file:
                raise ValueError(f"{origin}: file name {part.file!r} leaves the checkpoint's folder; refused")
    return index


def _box(item: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a ShardedTensor's part with all axes of the global tensor, stacked layers included."""
    return tuple(item.global_offset), (1,) * item.prepend_axis_num + tuple(item.local_shape)


def _copy_overlap(folder: Path, part: Part, offset: tuple[int, ...], result: Tensor) -> int:
    """Copy what a stored part and the wanted box share; returns the number of values."""
    low = [max(a, b) for a, b in zip(part.offset, offset, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(part.offset, part.shape, offset, result.shape, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return 0
    source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offset, strict=True))
    target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
    try:
        with safe_open(folder / part.file, framework="pt") as file:
            values = file.get_slice(part.name)[source] if source else file.get_tensor(part.name)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / part.file}: cannot read {part.name} ({error}); the checkpoint is damaged"
        ) from None
    result[target] = values
    return values.numel()
