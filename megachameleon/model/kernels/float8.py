"""Matrix products in FP8 (e4m3) with one scale for each row, by torch's `scaled_mm`.

Outputs and input gradients are FP8 products; the weight's gradient is not, since it sums over the whole run. Each
operand is scaled along the axis that is summed over, so a row with an outlier does not cost the others their bits.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max


def output(x: Tensor, weight: Tensor) -> Tensor:
    """x [m, k] times weight [n, k] transposed, in the dtype of `x`."""
    return _product(x, weight)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [m, n] times weight [n, k]."""
    return _product(grad, weight.t())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 rows and their fp32 scales [rows, 1]; `x` is about the product of the two."""
    wide = x.float()
    # At least 1e-12, so that a row of zeros is not divided by zero.
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(LARGEST)
    # Clamped, for e4m3fn has no infinity and a cast from beyond its largest gives NaN; laid out
    # anew, for scaled_mm wants rows in order and a cast keeps the strides of `weight.t()`.
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(FORMAT, memory_format=torch.contiguous_format), scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] b [n, k] transposed."""
    (a8, a_scale), (b8, b_scale) = quantize_rows(a), quantize_rows(b)
    return scaled_mm(a8, b8.t(), a_scale, ScalingType.RowWise, b_scale.t(), ScalingType.RowWise, output_dtype=a.dtype)
