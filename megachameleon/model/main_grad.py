"""How a layer that adds its weight's gradient to `main_grad` itself tells megatron-core's DistributedDataParallel."""

from torch import Tensor


def added_to_main_grad(weight: Tensor) -> Tensor:
    """Mark the gradient of `weight` as added; returns what backward hands to autograd in its place.

    The hook wants some gradient of the right shape to know that this one is ready, and drops it unread. The weight
    itself costs nothing; an expanded scalar would be copied to full size.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return weight.detach()
