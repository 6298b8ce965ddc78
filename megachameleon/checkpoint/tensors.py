"""Tensors on disk: one safetensors file a rank, and an index that says which box of which global tensor it holds.

Each rank stores what it brings (`snapshot.py` writes it). Reading fills any other division of the same tensors by
copying overlaps, so a checkpoint does not know the parallel layout that wrote it. safetensors cannot carry code, unlike
the pickles of torch's own formats.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, overlap, within


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A box of a global tensor, and the memory of this process from which it is written or into which it is read."""

    key: str
    """Of the global tensor."""
    global_shape: Shape
    """Of the global tensor."""
    offset: Shape
    data: Tensor
    """Of the box's shape; contiguous; usually a view of what training works on."""

    @property
    def box(self) -> Box:
        """Where in the global tensor."""
        return Box(self.offset, tuple(self.data.shape))

    @property
    def name(self) -> str:
        """The name in its file: key and offset, which no two boxes share."""
        return f"{self.key}@{','.join(map(str, self.offset))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A box of a global tensor, stored under `name` in `file`."""

    file: str
    """Name within the checkpoint's folder."""
    name: str
    """As `StoredTensor.name`."""
    box: Box
    """Where in the global tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """A global tensor and the parts that cover it."""

    shape: Shape
    dtype: str
    """torch's name without `torch.`, such as `bfloat16`."""
    parts: tuple[Part, ...]
    """They do not overlap."""


Index = dict[str, TensorEntry]


def index_of(tensors: Iterable[StoredTensor], file_name: str) -> Index:
    """The entries of the tensors of one file."""
    parts: dict[str, list[Part]] = defaultdict(list)
    kinds: dict[str, tuple[Shape, str]] = {}
    for item in tensors:
        parts[item.key].append(Part(file=file_name, name=item.name, box=item.box))
        kinds[item.key] = item.global_shape, str(item.data.dtype).removeprefix("torch.")
    return {key: TensorEntry(shape=kinds[key][0], dtype=kinds[key][1], parts=tuple(parts[key])) for key in parts}


def merge_indexes(indexes: Iterable[Index]) -> Index:
    """The index of all ranks' parts together."""
    parts: dict[str, list[Part]] = defaultdict(list)
    kinds: dict[str, tuple[Shape, str]] = {}
    for index in indexes:
        for key, entry in index.items():
            parts[key] += entry.parts
            kinds[key] = entry.shape, entry.dtype
    return {
        key: TensorEntry(shape=kinds[key][0], dtype=kinds[key][1], parts=tuple(parts[key])) for key in sorted(parts)
    }


@torch.no_grad()
def read_tensors(folder: Path, index: Index, wanted: Iterable[StoredTensor]) -> None:
    """Fill the memory of the boxes that are wanted, converting to its type.

    First it is planned what comes from which file; then each file is opened once, and closed before the next. Besides
    what is filled there is never more in memory than one part's overlap with one box.

    Raises:
        ValueError: the checkpoint lacks a tensor, holds it with another shape, does not cover a box, or cannot be read.
    """
    plan: dict[str, list[tuple[Part, tuple[slice, ...], Tensor]]] = defaultdict(list)
    for item in wanted:
        filled = 0
        for part in _entry(folder, index, item).parts:
            # boxes alone decide, so any layout reads what any other has written
            shared = overlap(part.box, item.box)
            if shared is not None:
                plan[part.file].append((part, within(part.box, shared), item.data[within(item.box, shared)]))
                filled += shared.size
        # before any file is opened: a half-filled model must not be trained on
        if filled != item.box.size:
            raise ValueError(
                f"{folder}: tensor {item.key} is incomplete ({filled} of {item.box.size} values at {item.offset}); the "
                " checkpoint is damaged: delete it to go on from the one before"
            )
    for name in sorted(plan):
        _read_file(folder / name, plan[name])


def index_to_json(index: Index) -> dict[str, Any]:
    """Plain values of an index."""
    return {
        key: {
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "parts": [[part.file, part.name, list(part.box.offset), list(part.box.shape)] for part in entry.parts],
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
                    Part(file=file, name=name, box=Box(tuple(offset), tuple(shape)))
                    for file, name, offset, shape in value["parts"]
                ),
            )
            for key, value in values.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{origin}: not an index of tensors; the checkpoint is damaged") from None
    for key, entry in index.items():
        for part in entry.parts:
            numbers = (*entry.shape, *part.box.offset, *part.box.shape)
            if any(type(number) is not int for number in numbers) or not isinstance(part.file, str):
                raise ValueError(f"{origin}: a box of {key} is not of whole numbers; the checkpoint is damaged")
            if Path(part.file).name != part.file:
                raise ValueError(f"{origin}: file name {part.file!r} leaves the checkpoint's folder; refused")
    return index


def _entry(folder: Path, index: Index, item: StoredTensor) -> TensorEntry:
    entry = index.get(item.key)
    if entry is None:
        raise ValueError(f"{folder}: has no tensor {item.key}; it belongs to another model")
    if entry.shape != item.global_shape:
        raise ValueError(
            f"{folder}: tensor {item.key} has shape {list(entry.shape)}, the model needs {list(item.global_shape)}; "
            "use the model configuration saved with the checkpoint"
        )
    return entry


def _read_file(path: Path, copies: list[tuple[Part, tuple[slice, ...], Tensor]]) -> None:
    """Copy slices of a file's parts to where they are wanted."""
    try:
        with safe_open(path, framework="pt") as file:
            for part, source, target in copies:
                target.copy_(file.get_slice(part.name)[source] if source else file.get_tensor(part.name))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); the checkpoint is damaged: delete it to go on from the one before"
        ) from None
