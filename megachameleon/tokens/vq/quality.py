"""How near reconstructions are to their originals: PSNR and SSIM; how evenly codes are used: perplexity."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIGMA = 1.5
SSIM_SIDE = 11
SSIM_CONSTANTS = (0.01**2, 0.03**2)
"""Window and constants of Wang et al. (2004), for values in 0..1."""


def psnr(pictures: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error over all of them together."""
    return psnr_of_error(float((pictures.float() - reconstructions.float()).square().mean()) / 255**2)


def psnr_of_error(mean_squared_error: float) -> float:
    """dB, for an error of values that span 0..1."""
    # equal pictures have 100 dB and not infinity, which JSON cannot say
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def ssim(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each picture, the mean over channels and windows inside it.

    Args:
        pictures: uint8 [B, C, H, W], sides of at least 11 pixels.
        reconstructions: the same.

    Returns:
        float64 [B], at most 1.
    """
    # fp64, because variances are small differences of large squares
    x, y = pictures.double() / 255, reconstructions.double() / 255
    channels = x.shape[1]
    offsets = torch.arange(SSIM_SIDE, dtype=x.dtype, device=x.device) - SSIM_SIDE // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    line = (line / line.sum()).expand(channels, 1, 1, -1)

    def blurred(values: Tensor) -> Tensor:
        # a Gaussian window is a product of two lines: 22 products a pixel instead of 121
        return F.conv2d(F.conv2d(values, line, groups=channels), line.transpose(2, 3), groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    spread_x, spread_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    together = blurred(x * y) - mean_x * mean_y
    first, second = SSIM_CONSTANTS
    luminance = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
    structure = (2 * together + second) / (spread_x + spread_y + second)
    return (luminance * structure).mean((1, 2, 3))


def perplexity(counts: Tensor) -> float:
    """How many codes would be as uncertain if all were equally likely, from int64 [codes] counts; 0 of no counts."""
    if not int(counts.sum()):
        return 0.0
    shares = counts.double() / counts.sum()
    return float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()))
