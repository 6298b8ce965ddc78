"""megatron-core 0.16's distributed optimizer with three faults of its checkpoints mended."""

from typing import Any

import torch
from torch import Tensor


def mend(optimizer: Any) -> None:
    """Turn a DistributedOptimizer into a mended one, in place; leave any other optimizer as it is."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if type(optimizer) is DistributedOptimizer:
        optimizer.__class__ = _mended(DistributedOptimizer)


def _mended(base: Any) -> type:
    class MendedDistributedOptimizer(base):
        """Restores the step count that torch.optim.AdamW keeps for each parameter, and saves several buckets right."""

        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            own = {"step": state["step"]} if "step" in state else {}  # apex and TE count in the group
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, **own})

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            # The base class hands every parameter the same tensor, which each of them would then increment.
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()

        def get_parameter_state_dp_zero(self, *arguments: Any, **options: Any) -> Any:
            """The base class takes the padding between buckets out, and then cuts parameters at padded places."""
            state = super().get_parameter_state_dp_zero(*arguments, **options)
            for number, buffer in enumerate(self.buffers):
                for tensors in state[number].values() if state else ():
                    tensors.update({k: _padded(v, buffer) for k, v in tensors.items() if isinstance(v, Tensor)})
            return state

    return MendedDistributedOptimizer


def _padded(joined: Tensor, buffer: Any) -> Tensor:
    """The contents of all buckets, joined without padding, at the places that they have in their buffer."""
    result, start = torch.zeros(buffer.numel, dtype=joined.dtype), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        result[bucket.offset : bucket.offset + size] = joined[start : start + size]
        start += size
    return result
