"""The terms that an image tokenizer is trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor

ADAPTIVE_EPSILON = 1e-4
ADAPTIVE_LIMIT = 1e4
"""Bounds of the adversarial term's adaptive weight, those of the VQ-GAN's authors."""


def reconstruction_terms(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean L1 and L2 distances of pixels in -1..1, and the L1 distance of neighbouring pixels' differences."""
    error = output - target
    edge = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "edge": edge}


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: half of the mean of max(0, 1 - score) over real patches and max(0, 1 + score) over drawn ones."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean score of drawn patches."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """The factor that makes the adversarial gradient as long as the reconstruction's.

    Esser et al. (https://arxiv.org/abs/2012.09841, equation 7); clamped to 0..10,000.

    Args:
        reconstruction: gradient of the reconstruction terms for the decoder's last weight, any shape.
        adversarial: gradient of the generator's loss for the same weight.

    Returns:
        A scalar without gradient.
    """
    ratio = reconstruction.norm() / (adversarial.norm() + ADAPTIVE_EPSILON)
    return ratio.clamp(0, ADAPTIVE_LIMIT).detach()


def gradients_at_output(loss: Tensor, output: Tensor) -> Tensor:
    """The gradient of `loss` for `output` (a leaf), zeros where it does not depend on it."""
    (gradient,) = torch.autograd.grad(loss, output, allow_unused=True)
    return torch.zeros_like(output) if gradient is None else gradient
