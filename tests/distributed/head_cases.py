"""What worker processes run for the tests of the head."""

import torch

from megachameleon.config import ParallelConfig
from megachameleon.model.head import Targets
from megachameleon.model.kernels import chunked_head, reference
from megachameleon.parallel.context import parallel_context

SEQUENCE, BATCH, HIDDEN, VOCAB = 20, 3, 24, 88
Z_LOSS = 0.02


def problem(dtype, seed=0):
    """Hidden states [s, b, h], head weight [v, h] and targets with weights of 0, 1 and between; labels of all ranks.

    The weight is the same at every seed.
    """
    torch.manual_seed(1000)
    weight = (torch.randn(VOCAB, HIDDEN) / 2).to(dtype)
    torch.manual_seed(seed)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN).to(dtype)
    weights = torch.randint(0, 5, (BATCH, SEQUENCE)) / 4
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE))
    return hidden, weight, Targets(labels=labels, weights=weights, is_image=labels < VOCAB // 3, z_loss=Z_LOSS)


def kernel(sizes):
    """The chunked head with blocks of (tokens, vocabulary), or the plain one."""
    if sizes is None:
        return reference.head_loss
    chosen = chunked_head.BlockSizes(tokens=sizes[0], vocabulary=sizes[1])
    return chunked_head.ChunkedHead(chosen)


def split_head(tensor_parallel, sequence_parallel, dtype, sizes):
    """Sums, and gradients of this rank's part of the hidden states and of the weight."""
    with parallel_context(ParallelConfig(tensor_parallel=tensor_parallel)) as context:
        hidden, weight, targets = problem(dtype)
        rank = context.tensor_rank
        hidden = (hidden.chunk(tensor_parallel)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        weight = weight.chunk(tensor_parallel)[rank].clone().requires_grad_()
        sums = kernel(sizes)(hidden, weight, targets, context.groups.tp, sequence_parallel)
        sums[0].backward()
        return sums.detach(), hidden.grad, weight.grad
