"""What the GPU tests share."""

import torch

DEVICE = "cuda"
TOLERANCE = 2e-2
"""Relative L2 error in bf16: a few units in the last place of eight bits."""


def results(function, inputs):
    leaves = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    return [output, *(leaf.grad for leaf in leaves)]


def assert_like_reference(function, reference, *inputs):
    """Same output and gradients."""
    for got, expected in zip(results(function, inputs), results(reference, inputs), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert (got.float() - expected.float()).norm() < TOLERANCE * expected.float().norm()
