"""What a process really allocates and sends, seen below autograd: the same for real and for fake tensors."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Part = Literal["weights", "gradients", "optimizer", "activations", "head", "buffers"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, slots=True, order=True)
class Collective:
    """One kind of message of a step."""

    axis: str
    """The parallel axis whose ranks take part."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, broadcast, send or recv."""
    ranks: int
    """That take part in one."""


@dataclass(frozen=True, slots=True)
class Volume:
    """How often a message is sent in a step, and how much in all."""

    count: int = 0
    """Messages."""
    bytes: int = 0
    """Sum over messages of the whole tensor: what all ranks hold together after a gather or before a scatter."""

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.count + other.count, self.bytes + other.bytes)

    def __sub__(self, other: "Volume") -> "Volume":
        return Volume(self.count - other.count, self.bytes - other.bytes)


Traffic = dict[Collective, Volume]

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
"""torch's operations by the names that people use."""

ONLY_WORK = {
    "send",
    "recv_",
    "allreduce_coalesced_",
    "reduce_scatter_tensor_coalesced_",
    "allgather_into_tensor_coalesced_",
    "barrier",
}
"""Those that return nothing but something to wait for; the others return their first argument too."""


class Allocations:
    """Live bytes of storages by part, and what they were when most was live."""

    def __init__(self) -> None:
        self.live: Counter[Part] = Counter()
        self.peak: dict[Part, int] = {}
        self._highest = 0
        self._total = 0
        self._part_of: Any = WeakIdKeyDictionary()  # storage -> (part, bytes, what to call when it dies)

    def add(self, tensor: Tensor, part: Part) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        if storage in self._part_of:
            return
        size = storage.nbytes()
        entry = [part, size]
        # The entry is a list, so that what is called at its death knows a later part and size.
        self._part_of[storage] = (entry, weakref.finalize(storage, self._free, entry))
        self._move(part, size)

    def assign(self, tensor: Tensor, part: Part) -> None:
        """Count the storage of a tensor under another part."""
        self.add(tensor, part)
        entry, _ = self._part_of[tensor.untyped_storage()]
        self._change(entry, part)

    def assign_all(self, before: Part, after: Part) -> None:
        """Count everything that lives in one part under another."""
        for entry, _ in list(self._part_of.values()):
            if entry[0] == before:
                self._change(entry, after)

    def forget_peak(self) -> None:
        """Look for the peak from here on."""
        self._highest, self.peak = self._total, dict(self.live)

    def resized(self, storage: Any) -> None:
        """Count a storage by its size of now; recomputation frees and fills outputs in this way."""
        if storage in self._part_of:
            entry, _ = self._part_of[storage]
            before, entry[1] = entry[1], storage.nbytes()
            self._move(entry[0], entry[1] - before)

    def _change(self, entry: list[Any], part: Part) -> None:
        self.live[entry[0]] -= entry[1]
        self.live[part] += entry[1]
        entry[0] = part

    def _free(self, entry: list[Any]) -> None:
        self._move(entry[0], -entry[1])

    def _move(self, part: Part, size: int) -> None:
        self.live[part] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.live)


class Watch(TorchDispatchMode):
    """While entered, counts storages that operations make, and messages between ranks.

    Args:
        axes: process group name to axis; groups of one rank send nothing and are not counted.
        pretend: messages go nowhere and every number that the host reads is 1, as fake tensors need.
    """

    def __init__(self, axes: Mapping[str, str], *, pretend: bool) -> None:
        super().__init__()
        self.memory = Allocations()
        self.traffic: Traffic = {}
        self._axes, self._pretend = axes, pretend
        self._parts: list[Part] = ["buffers"]
        self._patches = ExitStack()

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """What is allocated within is counted under `part`."""
        self._parts.append(part)
        try:
            yield
        finally:
            self._parts.pop()

    @contextmanager
    def follow(self, chunks: list[nn.Module]) -> Iterator[None]:
        """Count what forward passes of the decoder allocate as activations, and what the head allocates as its own.

        Layers are followed one by one because recomputation calls them in backward, outside of the decoder.
        """
        handles = []
        for chunk in chunks:
            for name, module in chunk.named_modules():
                part: Part = "head" if name.endswith("output_layer") else "activations"
                if not name or name.endswith("output_layer") or name.rpartition(".")[0].endswith("layers"):
                    handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._parts.append(part)))
                    handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __enter__(self) -> Self:
        # Methods of storages are no operations, so the mode does not see them.
        resize = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self.memory.resized(storage)
            return result

        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", counted))
        if self._pretend:  # there is nothing to copy, and fake tensors would keep both storages alive
            self._patches.enter_context(patch.object(torch.UntypedStorage, "copy_", lambda storage, *_: storage))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._patches.close()
        super().__exit__(*raised)

    def _leave(self) -> None:
        self._parts.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            return self._message(func, args, kwargs or {})
        if self._pretend and func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor
            return result
        for leaf in tree_leaves(result) if isinstance(result, (list, tuple)) else (result,):
            if isinstance(leaf, Tensor):
                self.memory.add(leaf, self._parts[-1])
        return result

    def _message(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        # In every operation of c10d tensors come before the group.
        position = next(i for i, argument in enumerate(args) if isinstance(argument, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(args[position])
        if group.size() > 1 and name != "barrier":
            sides = [tree_leaves(argument) for argument in args[:position]]
            # Of input and output the larger is the whole tensor: a gather makes it, a scatter takes it apart.
            size = max(sum(tensor.nbytes for tensor in side) for side in sides)
            if name in ("send", "recv_"):  # pipelines of two stages send one way through the group of all processes
                key = Collective("pipeline", KINDS[name], 2)
            else:
                key = Collective(self._axes.get(group.group_name, "other"), KINDS[name], group.size())
            self.traffic[key] = self.traffic.get(key, Volume()) + Volume(1, size)
            if name == "recv_":  # hidden states that wait for backward, or their gradients
                for tensor in sides[0]:
                    self.memory.assign(tensor, "activations")
        if not self._pretend:
            return func(*args, **kwargs)
        work = torch._C._distributed_c10d.FakeWork().boxed()
        return work if name in ONLY_WORK else (args[0], work)
