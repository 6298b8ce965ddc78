"""What a process holds of the optimizer's state, told alike for each of megatron-core's optimizers.

The plain optimizers hold the moments (and, for a bf16 model, the fp32 master) of whole parameters, the same on all
replicas. The distributed optimizer holds those of one contiguous range of a parameter's values, another on each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class HeldState:
    """The optimizer's state of the values `start` to `stop` of a model's parameter, which are counted row by row."""

    parameter: torch.nn.Parameter
    """Of the model, in its own precision."""
    start: int
    """First value, counted in row-major order."""
    stop: int
    """One behind the last."""
    tensors: dict[str, Tensor]
    """By name, [stop - start] in fp32, views of what the update works on: the moments `exp_avg` and `exp_avg_sq`, and
    `master` for a parameter that is not fp32 itself."""
    replicated: bool
    """Whether all replicas hold the same values."""

    def part(self, low: int, high: int) -> "HeldState":
        """The `low`-th to `high`-th of these values."""
        tensors = {name: tensor[low:high] for name, tensor in self.tensors.items()}
        return replace(self, start=self.start + low, stop=self.start + high, tensors=tensors)


def held_states(optimizer: Any) -> Iterator[HeldState]:
    """What this process holds of the state of a megatron-core optimizer, by parameter.

    Raises:
        AssertionError: Adam has no state yet.
    """
    for part in parts_of(optimizer):
        if part.optimizer is not None:  # a process that holds no parameter of a kind has none
            # Only the distributed optimizer has this map.
            yield from _distributed(part) if hasattr(part, "model_param_group_index_map") else _plain(part)


def own_share(states: Iterable[HeldState], rank: int, size: int) -> Iterator[HeldState]:
    """What one of `size` replicas answers for: what it alone holds, and an equal part of what all hold.

    The parts are cut from all values end to end, so that a replica has few tensors, most of them whole.
    """
    states = list(states)
    total = sum(held.stop - held.start for held in states if held.replicated)
    # Products before the division, so that neighbours' ends meet and nothing is lost or stored twice.
    low, high = total * rank // size, total * (rank + 1) // size
    for held in states:
        if not held.replicated:
            yield held
            continue
        length = held.stop - held.start
        if low < length and high > 0:
            yield held.part(max(low, 0), min(high, length))
        low, high = low - length, high - length


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the one that there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def create_state(optimizer: Any) -> None:
    """Make the state that Adam's first step would make, where there is none, so that it can be saved and filled."""
    for part in parts_of(optimizer):
        adam = part.optimizer
        for group in adam.param_groups if adam is not None else ():
            for parameter in group["params"]:
                state = adam.state[parameter]
                for name in MOMENTS:
                    state.setdefault(name, torch.zeros_like(parameter))
                if isinstance(adam, torch.optim.AdamW):
                    # As torch itself does: a fused update counts on the device, any other on the host.
                    device = parameter.device if group["fused"] else "cpu"
                    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))


def updates_done(optimizer: Any) -> int:
    """Updates that Adam has counted, by which it corrects its moments' bias; skipped ones are not among them.

    torch counts them for each parameter, apex and Transformer Engine for each group of parameters. All counts are the
    same, but a group without parameters does not count.
    """
    counts = [0]
    for adam in _adams(optimizer):
        counts += [int(group["step"]) for group in adam.param_groups if "step" in group]
        counts += [int(state["step"]) for state in list(adam.state.values())[:1] if "step" in state]
    return max(counts)


def set_updates_done(optimizer: Any, count: int) -> None:
    """Let Adam count on from here."""
    for adam in _adams(optimizer):
        if isinstance(adam, torch.optim.AdamW):
            for state in adam.state.values():
                # In place, for each parameter: a count that parameters share would be raised once for each of them.
                state["step"].fill_(count)
        else:
            for group in adam.param_groups:
                group["step"] = count


def _adams(optimizer: Any) -> list[Any]:
    return [part.optimizer for part in parts_of(optimizer) if part.optimizer is not None]


def _distributed(part: Any) -> Iterator[HeldState]:
    for parameter, (group, place) in part.model_param_group_index_map.items():
        main = part.optimizer.param_groups[group]["params"][place]
        values = part._get_model_param_range_map(parameter)["param"]
        yield _held(part, parameter, main, values.start, values.end, replicated=False)


def _plain(part: Any) -> Iterator[HeldState]:
    mains = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    # megatron-core puts an fp32 copy in the place of each parameter that has another precision.
    masters = {id(main): parameter for main, parameter in _masters(part)}
    for main in mains:
        yield _held(part, masters.get(id(main), main), main, 0, main.numel(), replicated=True)


def _masters(part: Any) -> Iterator[tuple[Tensor, torch.nn.Parameter]]:
    copies, originals = getattr(part, "fp32_from_float16_groups", []), getattr(part, "float16_groups", [])
    for group, original in zip(copies, originals, strict=True):
        yield from zip(group, original, strict=True)


def _held(
    part: Any, parameter: torch.nn.Parameter, main: Tensor, start: int, stop: int, *, replicated: bool
) -> HeldState:
    state = part.optimizer.state[main]
    assert all(name in state for name in MOMENTS), "Adam has no state; create_state makes it"
    tensors = {name: state[name] for name in MOMENTS}
    if parameter.dtype != torch.float32:
        tensors["master"] = main
    flat = {name: tensor.detach().view(-1) for name, tensor in tensors.items()}
    assert all(len(tensor) == stop - start for tensor in flat.values())
    return HeldState(parameter=parameter, start=start, stop=stop, tensors=flat, replicated=replicated)
