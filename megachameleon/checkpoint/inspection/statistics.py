"""Norms and other numbers of tensors, and the hash of a model, in one pass that holds one tensor at a time."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.inspection.tensors import Tensors

AT_A_TIME = 1 << 20
"""Values; what is computed from them stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNumbers:
    """What the values of a tensor are like; non-finite ones are counted and left out of everything else."""

    num_values: int
    norm: float
    """Euclidean."""
    mean: float
    std: float
    """Of all values, around their mean."""
    least: float
    most: float
    zeros: int
    not_finite: int

    @property
    def rms(self) -> float:
        """Root of the mean square: the norm without the size of the tensor."""
        return self.norm / math.sqrt(self.num_values) if self.num_values else 0.0

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rms": self.rms}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one pass over all tensors has found."""

    numbers: dict[str, TensorNumbers]
    """Of the tensors that could be read."""
    content_hash: str | None
    """None: nobody has asked, or a tensor could not be read."""


def numbers_of(tensor: Tensor) -> TensorNumbers:
    """Numbers of a tensor of any dtype, computed in fp64 from pieces of it."""
    flat = tensor.reshape(-1)
    total, squares, least, most, zeros, bad = 0.0, 0.0, math.inf, -math.inf, 0, 0
    for start in range(0, len(flat), AT_A_TIME):
        values = flat[start : start + AT_A_TIME].double()
        if not math.isfinite(float(values.sum())):  # also where finite ones overflow together, which fp64 never does
            finite = values.isfinite()
            bad += int((~finite).sum())
            values = values[finite]
            if not len(values):
                continue
        low, high = (float(value) for value in values.aminmax())
        total, squares = total + float(values.sum()), squares + float(values.dot(values))
        least, most = min(least, low), max(most, high)
        zeros += len(values) - int(values.count_nonzero())
    count = max(len(flat) - bad, 1)
    mean = total / count
    return TensorNumbers(
        num_values=len(flat),
        norm=math.sqrt(squares),
        mean=mean,
        std=math.sqrt(max(squares / count - mean * mean, 0.0)),
        least=least if least <= most else 0.0,
        most=most if least <= most else 0.0,
        zeros=zeros,
        not_finite=bad,
    )


def measure(
    tensors: Tensors, names: Iterable[str], advance: Callable[[int], None], *, numbers: bool, content: bool
) -> Measured:
    """Read tensors one after the other.

    Args:
        names: in this order, which the hash follows.
        advance: called with the bytes of each tensor.
        numbers: compute norms and the like.
        content: compute the hash of all values.
    """
    found: dict[str, TensorNumbers] = {}
    digest = hashlib.sha256()
    is_whole = True
    for name in names:
        info = tensors.infos[name]
        if info.problem:
            is_whole = False
            continue
        with torch.no_grad():
            tensor = tensors.read(name)
            if numbers:
                found[name] = numbers_of(tensor)
            if content and is_whole:
                add_to_hash(digest, name, tensor)
        advance(info.num_bytes)
    return Measured(numbers=found, content_hash=digest.hexdigest() if content and is_whole else None)


def add_to_hash(digest: Any, name: str, tensor: Tensor) -> None:
    """Add name, shape and values, as fp32 where that holds them all.

    So a model has the same hash in bf16 and in fp32, if the fp32 values are those of bf16.
    """
    wide = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
    kind = "float32" if wide else str(tensor.dtype).removeprefix("torch.")
    digest.update(json.dumps([name, list(tensor.shape), kind]).encode())
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), AT_A_TIME):
        values = flat[start : start + AT_A_TIME]
        values = values.float() if wide else values
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
