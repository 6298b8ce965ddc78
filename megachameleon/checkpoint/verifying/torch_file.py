"""Tensors of a torch file, read one at a time; the converter's own reader is another one, on purpose."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class StoredTensors:
    """What a torch file holds, by name. Opening it reads no weights; nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: not a torch file of tensors by name, or one of the old kind that is not a zip archive.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.path = path
        try:
            # Fake tensors know their place in the file. Mapping it instead fails where it is larger than memory,
            # because torch maps it writable, for which the kernel wants to have room.
            with FakeTensorMode():
                found = torch.load(path, map_location="cpu", weights_only=True)
            self._tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path}: not a torch file of named tensors ({_line(error)}); copy it again") from None

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            ValueError: it is not there, or damaged.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.path}: has no tensor {name}; it is not a file of the model beside it")
        fake = self._tensors[name]
        start = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
        if start is None or 0 in fake.shape:
            raise ValueError(f"{self.path}: {name} is empty, or in torch's form before 1.6; save the file again")
        start += fake.storage_offset() * fake.itemsize
        if start + extent * fake.itemsize > self.path.stat().st_size:
            raise ValueError(f"{self.path}: {name} ends behind the end of the file; copy it again")
        values = np.fromfile(self.path, dtype=np.uint8, count=extent * fake.itemsize, offset=start)
        return torch.from_numpy(values).view(fake.dtype).as_strided(fake.shape, fake.stride())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
