"""The small remainder of a state (learning rates, step counts) as JSON that loses nothing."""

from typing import Any

import torch


def to_plain(value: Any) -> Any:
    """Encode nested dicts, lists, numbers, strings, None and scalar tensors."""
    if isinstance(value, torch.Tensor):
        assert value.dim() == 0, f"a tensor of shape {tuple(value.shape)} in the common state"
        return {"$scalar": [str(value.dtype).removeprefix("torch."), value.item()]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: to_plain(item) for key, item in value.items()}
        return {"$items": [[key, to_plain(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value)} in the common state"
    return value


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`; tuples come back as lists."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$scalar" in value:
        dtype, number = value["$scalar"]
        return torch.tensor(number, dtype=getattr(torch, dtype))
    if "$items" in value:
        return {key: from_plain(item) for key, item in value["$items"]}
    return {key: from_plain(item) for key, item in value.items()}
