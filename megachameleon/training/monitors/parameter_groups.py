"""Kinds of weights, and which values of them a process answers for."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from megachameleon.checkpoint.state import unwrap
from megachameleon.model.initialization import global_names
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.optimizer_state import HeldState, held_states, own_share

GROUPS = ("embedding", "attention", "qk_norm", "feed_forward", "norm", "head")
MARKS = {
    "word_embeddings": "embedding",
    "output_layer": "head",
    "q_layernorm": "qk_norm",
    "k_layernorm": "qk_norm",
    "norm": "norm",
    "self_attention": "attention",
    "mlp": "feed_forward",
}
"""Part of a parameter's name to its group; the first that fits counts."""


def group_of(name: str) -> int:
    """Place in `GROUPS` of a parameter, by its global name."""
    return GROUPS.index(next(group for mark, group in MARKS.items() if mark in name))


class ParameterGroups:
    """Divides the optimizer's values by group, and among ranks so that each value counts once in the world."""

    def __init__(self, chunks: Sequence[nn.Module], context: ParallelContext) -> None:
        self.context = context
        self._group_of = {
            id(parameter): group_of(name) for chunk in chunks for name, parameter in global_names(unwrap(chunk))
        }

    def own(self, optimizer: Any) -> Iterator[tuple[int, HeldState]]:
        """Group and values that this rank answers for.

        Replicas share what all of them hold. Norms, which all tensor-parallel ranks hold whole, are the first one's.
        """
        replicas = self.context.groups.dp_cp
        for held in own_share(held_states(optimizer), replicas.rank(), replicas.size()):
            # Set by megatron-core on what is divided over tensor ranks.
            split = getattr(held.parameter, "tensor_model_parallel", False)
            if (split or self.context.tensor_rank == 0) and held.stop > held.start:
                yield self._group_of[id(held.parameter)], held
