"""The head: from hidden states to logits, or, with targets, straight to the sums that are learned and reported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the head is scored against."""

    labels: Tensor
    """int64 [b, s], ids of the whole vocabulary."""
    weights: Tensor
    """fp32 [b, s]; how much each label counts in the loss, 0 for not at all."""
    is_image: Tensor
    """bool [b, s]; whether the label is a picture's code."""
    z_loss: float
    """Factor of the squared log-partition in the loss."""

    def by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, weights and modality as [s * b], in the order of hidden states [s, b, h]."""
        labels, weights, is_image = (x.transpose(0, 1).flatten() for x in (self.labels, self.weights, self.is_image))
        return labels, weights.float(), is_image


HeadLoss = Callable[[Tensor, Tensor, Targets, Any, bool], Tensor]
"""(hidden, weight, targets, tensor-parallel group, sequence_parallel) to the sums of `loss_sums`."""


def loss_sums(nll: Tensor, log_z: Tensor, targets: Targets) -> Tensor:
    """What one micro-batch adds to the loss and to the report.

    Args:
        nll: fp32 [s * b], negative log-likelihood of each label.
        log_z: fp32 [s * b], log-partition at each position.

    Returns:
        fp64 [7]: loss, nll of text, nll of pictures, log Z, log Z squared, text labels, picture labels. The loss is
        the weighted sum of nll + z_loss * log Z ** 2, and alone has a gradient; the others count each label of positive
        weight once.
    """
    _, weights, is_image = targets.by_token()
    nll, log_z = nll.double(), log_z.double()
    loss = (weights * (nll + targets.z_loss * log_z.square())).sum()
    counted = (weights > 0).double()
    nll, log_z, image = nll.detach() * counted, log_z.detach(), is_image * counted
    columns = (nll * (1 - image), nll * image, log_z * counted, log_z.square() * counted, counted - image, image)
    return torch.stack([loss, *(column.sum() for column in columns)])


class LossHead(ColumnParallelLinear):
    """megatron-core's output layer, which with targets never shows the logits."""

    kernel: HeadLoss

    @classmethod
    def instead_of(cls, plain: ColumnParallelLinear, kernel: HeadLoss) -> "LossHead":
        """A head on the very weight of the output layer that megatron-core has built."""
        # Without a weight of its own, which would be as large as the embedding for a moment.
        head = cls(
            plain.input_size,
            plain.output_size,
            config=plain.config,
            init_method=None,
            bias=False,
            gather_output=plain.gather_output,
            skip_weight_param_allocation=True,
            tp_group=plain.tp_group,
        )
        head.weight, head.kernel = plain.weight, kernel
        return head

    def forward(self, input_: Tensor, *arguments: Any, targets: Targets | None = None, **named: Any) -> Any:
        """Hidden states [s (/ tensor_parallel), b, h] to (logits, bias), or with targets to the sums of `loss_sums`."""
        if targets is None:
            return super().forward(input_, *arguments, **named)
        return self.kernel(input_, self.weight, targets, self.tp_group, self.sequence_parallel)
