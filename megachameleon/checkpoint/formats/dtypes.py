"""The one type in which tensors of several types are read."""

from collections.abc import Collection
from pathlib import Path

import torch

FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""By the names that torch and our own indexes have for them."""


def widest(origin: Path, names: Collection[str]) -> torch.dtype:
    """A type that holds all values of these, such as `bfloat16`; no value of a weight is rounded when it is read.

    Raises:
        ValueError: a type that weights do not have.
    """
    if unknown := sorted(set(names) - FLOATS.keys()):
        raise ValueError(f"{origin}: tensors of type {', '.join(unknown)}; only floats are weights")
    found = {FLOATS[name] for name in names}
    if torch.float64 in found:
        return torch.float64
    return found.pop() if len(found) == 1 else torch.float32  # neither bf16 nor fp16 holds the other's values
