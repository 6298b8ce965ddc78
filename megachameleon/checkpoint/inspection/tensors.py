"""Tensors of a checkpoint under one set of names, whatever files they come from, whole or not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, overlap, within
from megachameleon.checkpoint.formats.huggingface.names import name_in_huggingface, num_heads
from megachameleon.checkpoint.formats.megatron.layout import global_key, global_shapes, places
from megachameleon.checkpoint.formats.megatron.source import targets
from megachameleon.checkpoint.formats.meta.names import (
    halves_together,
    is_qk_norm,
    name_in_meta,
    part_of_shard,
    shape_in_meta,
)
from megachameleon.checkpoint.formats.plain import layer_of, plain_shapes
from megachameleon.checkpoint.inspection.raw import NAMES, RawFile, listed
from megachameleon.checkpoint.tensors import Index, Part, TensorEntry
from megachameleon.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype
    files: tuple[str, ...] = ()
    """In which it lies, relative to the checkpoint."""
    problem: str = ""
    """Why it cannot be read; empty: it can."""

    @property
    def num_values(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return self.num_values * self.dtype.itemsize


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """By name, in the order of computation where there is one."""
        ...

    def read(self, name: str) -> Tensor:
        """All of a tensor, on the CPU, in its own dtype.

        Raises:
            ValueError: it cannot be read.
        """
        ...


class StoredTensors:
    """Every tensor of a set of files under the name that it has there."""

    def __init__(self, files: Iterable[RawFile]) -> None:
        """`files`: of a name in two of them, the first counts."""
        self._homes: dict[str, RawFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name not in self._homes:
                    self._homes[name] = file
                    self.infos[name] = TensorInfo(
                        shape=tensor.shape, dtype=tensor.dtype, files=(file.path.name,), problem=tensor.problem
                    )

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """See `Tensors`; `part`: a box of it alone."""
        return self._homes[name].read(name, part)


class PlainTensors:
    """The plain tensors of a decoder in Hugging Face's layout, with a QK-norm for each head."""

    def __init__(self, model: ModelConfig, stored: StoredTensors, variant: str = "heads") -> None:
        """`variant`: of QK-norm, as `HuggingFaceSource` knows them."""
        self._model, self._stored, self._variant = model, stored, variant
        self.infos = {}
        for name, shape in shapes_by_head(model).items():
            known = stored.infos.get(name_in_huggingface(name))
            self.infos[name] = _plain_info(shape, known, is_qk_norm(name))

    def read(self, name: str) -> Tensor:
        """See `Tensors`."""
        values, shape = self._stored.read(name_in_huggingface(name)), self.infos[name].shape
        if is_qk_norm(name):
            if self._variant == "anole":
                values = halves_together(values, self._model.head_dim)[None]
            return values.repeat_interleave(shape[0] // len(values), 0)
        if self._variant == "anole" and name.endswith((".q", ".k")):
            return halves_together(values, self._model.head_dim)
        return values


class MegatronTensors:
    """The plain tensors of a decoder in our own files, with a QK-norm for each head, as far as its boxes are there."""

    def __init__(self, model: ModelConfig, index: Index, files: Mapping[str, RawFile]) -> None:
        """`index`: of weights, or of their masters under the names of the weights."""
        self._model, self._files = model, files
        self._shapes = plain_shapes(model)
        self._global = global_shapes(model, self._shapes)
        self._entries = _by_layer(index)
        self.infos = {}
        for name, shape in shapes_by_head(model).items():
            entry = self._entry(name)
            self.infos[name] = TensorInfo(shape=shape, dtype=torch.float32, problem="missing in the index")
            if entry is not None:
                self.infos[name] = self._info(name, entry, shape)

    def _entry(self, name: str) -> TensorEntry | None:
        return self._entries.get((global_key(self._model, name), layer_of(name)[0]))

    def _info(self, name: str, entry: TensorEntry, shape: Shape) -> TensorInfo:
        wanted = self._global[global_key(self._model, name)]
        if entry.shape != wanted:
            problem = f"the index says {list(entry.shape)}, the configuration {list(wanted)}"
            return TensorInfo(shape=shape, dtype=NAMES[entry.dtype], problem=problem)
        problem, covered, names = "", 0, set()
        # On the meta device, where the targets of a whole matrix take no memory.
        for _, box, _ in self._targets(name, entry, torch.empty(self._shapes[name], device="meta")):
            for part, shared in _shared(entry, box):
                names.add(part.file)
                covered += shared.size
                problem = problem or self._problem(part, NAMES[entry.dtype])
        if covered != math.prod(self._shapes[name]) and not problem:
            problem = f"its parts hold {covered:,} of {math.prod(self._shapes[name]):,} values"
        return TensorInfo(shape=shape, dtype=NAMES[entry.dtype], files=tuple(sorted(names)), problem=problem)

    def _problem(self, part: Part, dtype: torch.dtype) -> str:
        file = self._files.get(part.file)
        tensor = file.tensors.get(part.name) if file else None
        if tensor is None:
            return f"{part.file} is missing" if file is None else f"{part.file} does not hold {part.name}"
        if (tensor.shape, tensor.dtype) != (part.box.shape, dtype):
            said = f"{list(tensor.shape)} {tensor.dtype}, the index says {list(part.box.shape)} {dtype}"
            return f"{part.file}: {part.name} is {said}"
        return tensor.problem

    def _targets(self, name: str, entry: TensorEntry, values: Tensor) -> Iterable[tuple[str, Box, Tensor]]:
        everything = Box((0,) * values.dim(), tuple(values.shape))
        for offset, data in targets(
            places(self._model, name, self._shapes[name]), everything, values, len(entry.shape)
        ):
            yield name, Box(offset, tuple(data.shape)), data

    def read(self, name: str) -> Tensor:
        """See `Tensors`."""
        entry, info = self._entry(name), self.infos[name]
        if entry is None or info.problem:
            raise ValueError(f"{name}: {info.problem}")
        values = torch.empty(self._shapes[name], dtype=info.dtype)
        for _, box, data in self._targets(name, entry, values):
            for part, shared in _shared(entry, box):
                read = self._files[part.file].read(part.name, within(part.box, shared))
                data[within(box, shared)].copy_(read)
        return values.repeat_interleave(info.shape[0] // len(values), 0) if is_qk_norm(name) else values


class MetaTensors:
    """The plain tensors of a decoder in Meta's files, with a QK-norm for each head."""

    def __init__(self, model: ModelConfig, files: Sequence[RawFile | None]) -> None:
        """`files`: in the order of their parts; None: missing."""
        self._model, self._files = model, files
        self._shapes = plain_shapes(model)
        self.infos = {name: self._info(name, shape) for name, shape in shapes_by_head(model).items()}

    def _info(self, name: str, shape: Shape) -> TensorInfo:
        problem, dtypes, names = "", [], []
        wanted = shape_in_meta(name, self._shapes[name], len(self._files))
        for number, file in enumerate(self._files):
            tensor = file.tensors.get(name_in_meta(name)) if file else None
            if file is None or tensor is None:
                problem = problem or (f"missing in {file.path.name}" if file else f"file {number} is missing")
                continue
            if tensor.shape != wanted:
                problem = problem or f"{file.path.name}: is {list(tensor.shape)}, params.json says {list(wanted)}"
            problem = problem or tensor.problem
            dtypes.append(tensor.dtype)
            names.append(file.path.name)
        dtype = dtypes[0] if dtypes else torch.float32
        return TensorInfo(shape=shape, dtype=dtype, files=tuple(names), problem=problem)

    def read(self, name: str) -> Tensor:
        """See `Tensors`."""
        info, shape, shards = self.infos[name], self._shapes[name], len(self._files)
        if info.problem:
            raise ValueError(f"{name}: {info.problem}")
        values = torch.empty((shards, shape[1]) if is_qk_norm(name) else shape, dtype=info.dtype)
        for shard, file in enumerate(self._files):
            assert file is not None, name
            box = part_of_shard(name, tuple(values.shape), shard, shards)
            values[within(Box((0,) * values.dim(), tuple(values.shape)), box)] = file.read(name_in_meta(name)).view(
                box.shape
            )
        if is_qk_norm(name):
            values = torch.stack([halves_together(row, self._model.head_dim) for row in values])
            return values.repeat_interleave(info.shape[0] // shards, 0)
        return halves_together(values, self._model.head_dim) if name.endswith((".q", ".k")) else values


def shapes_by_head(model: ModelConfig) -> dict[str, Shape]:
    """Plain shapes with a row of QK-norm for each head, in which any number of groups compares."""
    shapes = plain_shapes(model)
    return {n: (num_heads(model, n), shape[1]) if is_qk_norm(n) else shape for n, shape in shapes.items()}


def _plain_info(shape: Shape, known: TensorInfo | None, is_norm: bool) -> TensorInfo:
    if known is None:
        return TensorInfo(shape=shape, dtype=torch.float32, problem="missing")
    # A norm may be stored by head, by group, or once for all.
    rows = known.shape[0] if len(known.shape) == 2 else 1
    fits = is_norm and known.shape[-1:] == shape[-1:] and rows > 0 and shape[0] % rows == 0
    if known.shape != shape and not fits:
        problem = f"is {list(known.shape)}, the configuration says {list(shape)}"
        return replace(known, problem=known.problem or problem)
    return replace(known, shape=shape)


def _by_layer(index: Index) -> dict[tuple[str, int | None], TensorEntry]:
    """The parts of each layer by themselves; a large run's stacked tensors have thousands."""
    parts: dict[tuple[str, int | None], list[Part]] = {}
    for key, entry in index.items():
        stacked = key.startswith("decoder.layers.")
        for part in entry.parts:
            rows = range(part.box.offset[0], part.box.offset[0] + part.box.shape[0]) if stacked else (None,)
            for layer in rows:
                parts.setdefault((key, layer), []).append(part)
    return {place: replace(index[place[0]], parts=tuple(found)) for place, found in parts.items()}


def _shared(entry: TensorEntry, box: Box) -> Iterable[tuple[Part, Box]]:
    for part in entry.parts:
        shared = overlap(part.box, box)
        if shared is not None:
            yield part, shared


def missing_of(tensors: Tensors) -> str:
    """The tensors that cannot be read, in a line; empty: all can."""
    bad = [f"{name} ({info.problem})" for name, info in tensors.infos.items() if info.problem]
    return f"{len(bad)} of {len(tensors.infos)} tensors cannot be read: {listed(bad)}" if bad else ""


def safe_child(folder: Path, name: str) -> Path | None:
    """A file of a folder by the name that another file gives it; None: it would leave the folder."""
    return folder / name if name and Path(name).name == name and name not in (".", "..") else None
