"""Norms and other numbers of tensors, and the hash of a model, in one pass that holds one tensor at a time."""

import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.inspection.raw import listed
from megachameleon.checkpoint.inspection.report import Report

AT_A_TIME = 1 << 16
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
        values = {**asdict(self), "rms": self.rms}
        return {name: plain_number(value) for name, value in values.items()}


def plain_number(value: float) -> float | None:
    """A number as JSON has it: none is infinite."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one pass over all tensors has found."""

    numbers: dict[str, TensorNumbers]
    """Of the tensors that could be read."""
    content_hash: str | None
    """None: nobody has asked, or a tensor could not be read."""

    @property
    def norms(self) -> dict[str, float]:
        """By name."""
        return {name: found.norm for name, found in self.numbers.items()}

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"content_hash": self.content_hash}
        if self.numbers:
            found["numbers"] = {name: numbers.as_plain() for name, numbers in self.numbers.items()}
        return found


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


def chosen(report: Report, pattern: str | None) -> list[str]:
    """Names that fit a pattern such as `*.q_norm.*`; None: all but the state of an optimizer.

    Raises:
        ValueError: none fits.
    """
    infos = report.tensors.infos
    if pattern is None:
        return [name for name in infos if not name.startswith("optimizer.")]
    found = [name for name in infos if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"--tensors {pattern}: fits none of {len(infos)} names, such as {listed(infos)}")
    return found


def measure(
    report: Report, names: Sequence[str], advance: Callable[[int], None], *, numbers: bool, content: bool
) -> Measured:
    """Read tensors one after the other; what cannot be read, or is not finite, goes to the report's problems.

    Args:
        names: whose numbers are wanted.
        advance: called with the bytes of each tensor.
        numbers: compute norms and the like.
        content: compute the hash of all tensors.
    """
    tensors, wanted = report.tensors, set(names)
    found: dict[str, TensorNumbers] = {}
    digest = hashlib.sha256()
    is_whole = bool(tensors.infos)
    # Plain tensors have an order of their own; that of files follows from how they were written.
    all_names = list(tensors.infos) if report.uses_plain else sorted(tensors.infos)
    for name in all_names if content else names:
        info = tensors.infos[name]
        try:
            tensor = None if info.problem else tensors.read(name)
        except (ValueError, OSError) as error:
            report.problems.append(f"{name}: {error}")
            tensor = None
        if tensor is None:
            is_whole = False
            continue
        if numbers and name in wanted:
            found[name] = numbers_of(tensor)
            if found[name].not_finite:
                report.problems.append(f"{name}: {found[name].not_finite:,} values are not finite")
        # A hash over part of the tensors would look like that of another model.
        if content and is_whole:
            add_to_hash(digest, name, tensor)
        advance(info.num_bytes)
    found = {name: found[name] for name in names if name in found}
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
