"""Tensors of torch files as `raw.py` has them; nothing is unpickled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.inspection.raw import RawTensor
from megachameleon.torch_files import TorchTensor, read_part, read_torch_index

MOST_DEPTH = 8
"""Of dictionaries in each other, such as `state_dict` or `model`."""
MOST_VALUES = 1_000_000
LONGEST_NAME = 1_000
"""Characters; one long key would stand in the name of everything below it."""


class TorchFile:
    """A file of torch.save; tensors in dictionaries of a dictionary have names with dots."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: it is damaged, or holds other objects than tensors and plain values.
        """
        self.path = path
        self.problems: tuple[str, ...] = ()
        self.metadata: dict[str, Any] = {}
        self._places: dict[str, TorchTensor] = {}
        for count, (name, value) in enumerate(_leaves(read_torch_index(path), "", 0)):
            if count == MOST_VALUES:
                raise ValueError(f"{path}: holds more than {MOST_VALUES:,} values; no model does")
            if len(name) > LONGEST_NAME:
                raise ValueError(f"{path}: holds a name of {len(name):,} characters; no model does")
            if isinstance(value, TorchTensor):
                self._places[name] = value
            elif isinstance(value, str | int | float | bool) and len(self.metadata) < 100:
                self.metadata[name] = value
        self.tensors = {
            name: RawTensor(name=name, shape=place.shape, dtype=place.dtype, begin=place.start)
            for name, place in self._places.items()
        }

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """See `RawFile`."""
        place = self._places[name]
        axes = part if part is not None else tuple(slice(0, n) for n in place.shape)
        values = torch.empty([axis.stop - axis.start for axis in axes], dtype=place.dtype)
        read_part(self.path, place, axes, values)
        return values


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    # Empty ones are leaves, too, so that the leaves bound the time where the same dictionary stands in many places.
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not value or items is None or depth == MOST_DEPTH:
        yield name, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth + 1)
