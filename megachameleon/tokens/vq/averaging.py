"""A running average of a network's weights: what is evaluated and saved."""

from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class AveragedWeights(Generic[Network]):
    """The exponential moving average of a network's parameters, in a copy of it.

    Early on it forgets faster, so that it is not an average with the initial weights: after t steps at most (1 + t) of
    (10 + t) of it stay.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.network: Network = deepcopy(network).eval().requires_grad_(False)
        """The network with averaged weights."""

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        kept = min(self.decay, (1 + step) / (10 + step))
        # one kernel for all tensors; a loop would start hundreds at each step
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - kept)
