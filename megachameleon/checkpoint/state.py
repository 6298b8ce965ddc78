"""What a checkpoint holds of a model and its optimizer, in megatron-core's sharded form."""

from collections.abc import Sequence
from typing import Any

import torch


def unwrap(model: torch.nn.Module) -> Any:
    """The decoder inside data-parallel and precision wrappers."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any | None, groups: Any, *, is_loading: bool
) -> dict[str, Any]:
    """Weights and, if there is one, optimizer states as nested dicts of ShardedTensors and plain values.

    Under `model` the weights stand by the number of the chunk; their keys are global, so how the layers were divided
    into chunks does not matter.
    """
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    weights = {str(i): unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state
