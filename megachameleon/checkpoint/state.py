"""What a checkpoint holds of a model and its optimizer, as boxes of global tensors that know no parallel layout.

Tensors of the state have the key of their weight: `KEY` is the weight in the precision of training,
`optimizer.exp_avg.KEY` and `optimizer.exp_avg_sq.KEY` are Adam's moments and `optimizer.master.KEY` the fp32 copy of a
weight that is not fp32 itself. megatron-core's `sharded_state_dict` of the model says where in a global tensor a
process's parameter stands; the optimizer says which of its values the process holds the state of.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Shape, boxes_of_range
from megachameleon.checkpoint.tensors import Index, StoredTensor, read_tensors
from megachameleon.parallel.optimizer_state import (
    create_state,
    held_states,
    own_share,
    set_updates_done,
    updates_done,
)

UPDATES = "optimizer_updates"
"""Updates that Adam has counted."""


def unwrap(model: torch.nn.Module) -> Any:
    """The decoder inside data-parallel and precision wrappers."""
    inner: Any = model
    # megatron-core's wrappers nest: DistributedDataParallel around Float16Module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def training_state(chunks: Sequence[torch.nn.Module], optimizer: Any | None, groups: Any) -> list[StoredTensor]:
    """What this rank writes to a checkpoint: its own share of all state, nothing gathered and nothing copied.

    The shares of all ranks together are every value of every tensor exactly once: where replicas hold the same, each
    gives an equal part of it. All weights must be in place (`gather_parameters`).

    Args:
        chunks: this process's model chunks.
        optimizer: megatron-core's; None: weights alone, which the first of the replicas gives.
        groups: megatron-core's ProcessGroupCollection.

    Returns:
        Boxes whose `data` are views of live parameters and optimizer state, on their device: copy them before the next
        step changes them. They and `common_state` are all that `load_state` needs.
    """
    places = _places(chunks, groups)
    stored: list[StoredTensor] = []
    if optimizer is None:
        for place in places.values() if groups.dp_cp.rank() == 0 else ():
            stored += place.boxes("", place.parameter.detach().view(-1), 0) if place.is_stored else ()
        return stored
    # replicas each give an equal part, so they write in parallel
    for held in own_share(held_states(optimizer), groups.dp_cp.rank(), groups.dp_cp.size()):
        place = places[id(held.parameter)]
        if place.is_stored:
            weight = held.parameter.detach().view(-1)[held.start : held.stop]
            for name, values in {"": weight, **held.tensors}.items():
                stored += place.boxes(name, values, held.start)
    return stored


def common_state(optimizer: Any | None) -> dict[str, int]:
    """The rest of the state, the same on all ranks, as plain values for JSON. Reads one number from the device."""
    return {UPDATES: 0 if optimizer is None else updates_done(optimizer)}


def load_state(
    checkpoint: Path,
    index: Index,
    common: dict[str, int],
    chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    groups: Any,
    *,
    fresh: bool = False,
) -> None:
    """Fill model chunks and, if given, their optimizer from what ranks of any layout and precision have written.

    Weights, moments and masters are the stored ones to the bit wherever they have the same precision. What an fp32 run
    saved as weight is the master of a bf16 run, and the other way round.

    Args:
        checkpoint: the folder.
        index: of all its files.
        common: what `common_state` returned.
        fresh: take weights and masters alone; moments and the count of updates stay those of a new optimizer.

    Raises:
        ValueError: the checkpoint lacks something, belongs to another model, or cannot be read.
    """
    places = _places(chunks, groups)
    wanted: list[StoredTensor] = []
    for place in places.values():
        weight = place.parameter.detach().view(-1)
        # a bf16 run's master is the better weight for an fp32 run
        exact = weight.dtype == torch.float32 and place.key("master") in index
        wanted += place.boxes("master" if exact else "", weight, 0)
    if optimizer is not None:
        # Adam makes its moments at the first step, and there must be memory to read into
        create_state(optimizer)
        for held in held_states(optimizer):
            place = places[id(held.parameter)]
            for name, values in held.tensors.items():
                if fresh and name != "master":
                    continue
                # an fp32 run stores no master, because its weight is one
                missing_master = name == "master" and place.key(name) not in index
                wanted += place.boxes("" if missing_master else name, values, held.start)
        set_updates_done(optimizer, 0 if fresh else common[UPDATES])
    read_tensors(checkpoint, index, wanted)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A stretch of a parameter's values that is one box of a global tensor."""

    first: int
    global_shape: Shape
    offset: Shape
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the values of a process's parameter stand in the global tensor."""

    parameter: Tensor
    weight_key: str
    pieces: tuple[_Piece, ...]
    """One, or two for SwiGLU's input projection: gate and up stand apart in the global tensor."""
    is_stored: bool
    """Whether this tensor-parallel rank stores it; a norm's weight is the same on all."""

    def key(self, name: str) -> str:
        """The key of the weight (no name) or of a tensor of its state."""
        return f"optimizer.{name}.{self.weight_key}" if name else self.weight_key

    def boxes(self, name: str, values: Tensor, start: int) -> Iterator[StoredTensor]:
        """Boxes over `values` [n], which stand from the `start`-th on in the parameter or in a tensor of its state."""
        for piece in self.pieces:
            begin, end = piece.first, piece.first + math.prod(piece.shape)
            low, high = max(begin, start), min(end, start + len(values))
            for box in boxes_of_range(piece.shape, low - begin, high - begin):
                offset = tuple(a + b for a, b in zip(piece.offset, box.offset, strict=True))
                data, low = values[low - start : low - start + box.size].view(box.shape), low + box.size
                yield StoredTensor(key=self.key(name), global_shape=piece.global_shape, offset=offset, data=data)


def _places(chunks: Sequence[torch.nn.Module], groups: Any) -> dict[int, _Place]:
    """Places of the parameters of model chunks, by the parameter's id."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    places = {}
    for chunk in chunks:
        for item in unwrap(chunk).sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
            # megatron-core's layers announce extra state, in which Transformer Engine's would keep FP8 scales
            if isinstance(item, ShardedObject):
                assert item.data is None, f"{item.key}: extra state of a kernel that this format does not store"
                continue
            assert isinstance(item.data, torch.nn.Parameter), f"{item.key}: a buffer, which this format does not store"
            # SwiGLU's gate and up stand in one parameter, but apart in the global tensor
            sharded = item.build() if isinstance(item, ShardedTensorFactory) else [item]
            places[id(item.data)] = _Place(
                parameter=item.data,
                weight_key=item.key,
                pieces=tuple(_piece(part, item.data) for part in sharded),
                # the last number counts data-parallel replicas, among which `own_share` divides
                is_stored=all(number == 0 for number in item.replica_id[:-1]),
            )
    return places


def _piece(sharded: Any, parameter: Tensor) -> _Piece:
    """A ShardedTensor's box with all axes of the global tensor, stacked layers included."""
    assert sharded.data.is_contiguous(), f"{sharded.key}: its part is not one stretch of the parameter"
    return _Piece(
        first=sharded.data.storage_offset() - parameter.storage_offset(),
        global_shape=tuple(sharded.global_shape),
        offset=tuple(sharded.global_offset),
        # layers are stacked along axes that a rank's own parameter does not have
        shape=(1,) * sharded.prepend_axis_num + tuple(sharded.local_shape),
    )
