"""The VQ-GAN's encoder on a CPU, a strip of rows at a time; `VQGAN.encode` is the plain way.

At 512 x 512 pixels an activation takes 134 MB, and the plain way passes over memory for every norm, activation and sum,
and asks the system for fresh pages each time. Here all that stands between two convolutions happens to a strip of rows
while it is in the cache. A group norm needs the moments of the whole activation: they are gathered as it is made.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megachameleon.tokens.vq.vqgan import (
    NORM_EPSILON,
    NORM_GROUPS,
    VQGAN,
    Attention,
    Downsample,
    Level,
    ResidualBlock,
    VQGANConfig,
)

STRIP_BYTES = 2**21
"""Of fp32 activations: a strip and what is made of it stay in the caches of one core."""

Rows = Callable[[Tensor], Tensor]


class Activation:
    """Values fp32 [rows, columns, channels] of one picture, with each channel's moments over them.

    Args:
        values: to be filled, by `put`.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.count = values, 0
        self.mean, self.deviations = torch.zeros(2, values.shape[2], dtype=torch.float64)
        """fp64 [channels]; sums of squared deviations from the mean."""

    def put(self, top: int, *terms: Tensor) -> None:
        """Store one strip, or the sum of two, as the rows from `top` on; its moments are added (Chan et al., 1979)."""
        strip = self.values[top : top + len(terms[0])]
        if len(terms) == 2:
            torch.add(*terms, out=strip)
        else:
            strip.copy_(terms[0])
        positions = strip.flatten(0, 1)
        mean = positions.mean(0)
        deviations = (positions - mean).square_().sum(0)
        count = self.count + len(positions)
        step = mean.double() - self.mean
        self.deviations += deviations.double() + step.square() * (self.count * len(positions) / count)
        self.mean += step * (len(positions) / count)
        self.count = count


class StripEncoder:
    """Computes what `VQGAN.encode` does, one picture at a time, within rounding.

    Args:
        dtype: of what the 3x3 convolutions multiply, float32 or bfloat16; all else is fp32.
    """

    def __init__(self, network: VQGAN, config: VQGANConfig, dtype: torch.dtype = torch.float32) -> None:
        self._encoder, self._quant_conv, self._dtype = network.encoder, network.quant_conv, dtype
        # cast and laid out once; conv2d would do it for every strip
        self._weights = {
            module: (module.weight.to(dtype).contiguous(memory_format=torch.channels_last), module.bias.to(dtype))
            for module in network.encoder.modules()
            if isinstance(module, nn.Conv2d) and module.bias is not None
        }
        # Fresh memory costs a tenth of all the time; the lock keeps a second thread out of these two.
        largest = max(c * (config.image_size >> level) ** 2 for level, c in enumerate(config.channels))
        self._buffers, self._lock = torch.empty(2, largest), threading.Lock()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in -1..1 to vectors [B, code_dim, grid, grid]."""
        with self._lock:
            return torch.cat([self._encode(picture.permute(1, 2, 0)) for picture in pixels])

    def twin(self) -> "StripEncoder":
        """One for another thread: it shares the weights and has buffers of its own."""
        twin = copy.copy(self)
        twin._buffers, twin._lock = torch.empty_like(self._buffers), threading.Lock()
        return twin

    def _encode(self, picture: Tensor) -> Tensor:
        encoder = self._encoder
        x = self._convolve(encoder.conv_in, picture, self._cast)
        for level in cast(Iterable[Level], encoder.down):
            for block in cast(Iterable[ResidualBlock], level.block):
                x = self._residual(block, x)
            if isinstance(level.downsample, Downsample):
                x = self._downsample(level.downsample.conv, x.values)
        x = self._attend(encoder.mid.attn_1, self._residual(encoder.mid.block_1, x))
        x = self._residual(encoder.mid.block_2, x)
        x = self._convolve(encoder.conv_out, x.values, self._activate(encoder.norm_out, x))
        return self._quant_conv(to_planes(x.values))

    def _residual(self, block: ResidualBlock, x: Activation) -> Activation:
        change = self._convolve(block.conv1, x.values, self._activate(block.norm1, x))
        return self._convolve(block.conv2, change.values, self._activate(block.norm2, change), block.nin_shortcut, x)

    def _convolve(
        self,
        conv: nn.Conv2d,
        values: Tensor,
        before: Rows,
        shortcut: nn.Module | None = None,
        x: Activation | None = None,
    ) -> Activation:
        """conv(before(values)), to which shortcut(x) is added, in the place of x if it has the size."""
        rows, columns, _ = values.shape
        if x is None:
            made = Activation(self._room(rows, columns, conv.out_channels, beside=values))
        else:
            # in place: shortcuts are 1x1, so no row of x is read after it is written
            made = Activation(x.values if x.values.shape == values.shape else torch.empty_like(values))
        height = strip_height(columns, max(conv.in_channels, conv.out_channels))
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            # a 3x3 convolution sees one row above and one below
            strip = before(values[max(top - 1, 0) : bottom + 1])
            # zeros only at the picture's border; inside, neighbouring rows are real
            if top == 0 or bottom == rows:
                strip = F.pad(strip, (0, 0, 0, 0, int(top == 0), int(bottom == rows)))
            terms = [to_rows(F.conv2d(to_planes(strip), *self._weights[conv], padding=(0, 1)))]
            if shortcut is not None and x is not None:
                terms.append(to_rows(shortcut(to_planes(x.values[top:bottom]))))
            made.put(top, *terms)
        return made

    def _downsample(self, conv: nn.Conv2d, values: Tensor) -> Activation:
        rows, columns, channels = values.shape
        made = Activation(self._room(rows // 2, columns // 2, channels, beside=values))
        height = strip_height(columns, channels)
        for top in range(0, rows // 2, height):
            strip = self._cast(values[2 * top : 2 * (top + height) + 1])
            strip = F.pad(strip, (0, 0, 0, 1, 0, 1))  # a stride of 2 reaches the row below in the last strip only
            made.put(top, to_rows(F.conv2d(to_planes(strip), *self._weights[conv], stride=2)))
        return made

    def _room(self, rows: int, columns: int, channels: int, beside: Tensor) -> Tensor:
        """The buffer in which `beside` does not lie."""
        start = self._buffers.data_ptr()
        buffer = self._buffers[1 if beside.data_ptr() == start else 0]
        return buffer[: rows * columns * channels].view(rows, columns, channels)

    def _attend(self, attention: Attention, x: Activation) -> Activation:
        values = to_rows(attention(to_planes(x.values)))
        made = Activation(torch.empty_like(values))
        made.put(0, values)
        return made

    def _activate(self, norm: nn.GroupNorm, x: Activation) -> Rows:
        """silu(norm(rows)), the norm being that of all of `x`."""
        means, deviations = x.mean.view(NORM_GROUPS, -1), x.deviations.view(NORM_GROUPS, -1)
        mean = means.mean(1, keepdim=True)
        # within channels and between them: a group's moments are not kept
        variance = deviations.mean(1, keepdim=True) / x.count + (means - mean).square().mean(1, keepdim=True)
        scale = (norm.weight.view(NORM_GROUPS, -1) / (variance + NORM_EPSILON).sqrt()).float()
        shift = (norm.bias.view(NORM_GROUPS, -1) - mean * scale).float()
        scale, shift = scale.flatten(), shift.flatten()
        return lambda rows: self._cast(F.silu(torch.addcmul(shift, rows, scale), inplace=True))

    def _cast(self, rows: Tensor) -> Tensor:
        return rows.to(self._dtype)


def strip_height(columns: int, channels: int) -> int:
    """Rows in a strip."""
    return max(1, STRIP_BYTES // (4 * columns * channels))


def to_planes(rows: Tensor) -> Tensor:
    """[rows, columns, channels] to [1, channels, rows, columns]; moves nothing, as torch calls it channels last."""
    return rows.permute(2, 0, 1)[None]


def to_rows(planes: Tensor) -> Tensor:
    """[1, channels, rows, columns] to [rows, columns, channels]."""
    return planes[0].permute(1, 2, 0)
