"""The small convolutional autoencoder between pixels and code vectors.

Nearly all of its work is done at twice the resolution of the code grid: the first layer folds patches of pixels into
channels and the last one unfolds them. That makes a training step cheap enough for two CPU cores.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchConfig:
    """Shape of a `PatchAutoencoder`."""

    image_size: int = 64
    """Side of a picture in pixels; a multiple of twice `grid`."""
    grid: int = 8
    """Rows and columns of codes."""
    code_dim: int = 32
    """Length of a code vector."""
    fine_channels: int = 64
    """Channels at twice the grid's resolution."""
    coarse_channels: int = 128
    """Channels at the grid's resolution."""
    encoder_blocks: int = 1
    """Residual blocks of the encoder at each resolution."""
    decoder_blocks: int = 2
    """Residual blocks of the decoder at each resolution."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.image_size % (2 * self.grid):
            smaller = self.image_size // (2 * self.grid) * 2 * self.grid
            choices = [str(size) for size in (smaller, smaller + 2 * self.grid) if size]
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of twice grid={self.grid}; take {' or '.join(choices)}"
            )

    @property
    def fold(self) -> int:
        """Side in pixels of the patch that one position at the fine resolution stands for."""
        return self.image_size // (2 * self.grid)


class PatchAutoencoder(nn.Module):
    """Encoder and decoder; see the module's docstring."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        fine, coarse, pixels = config.fine_channels, config.coarse_channels, 3 * config.fold**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(config.fold),
            nn.Conv2d(pixels, fine, 3, padding=1),
            *[ResidualBlock(fine) for _ in range(config.encoder_blocks)],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            *[ResidualBlock(coarse) for _ in range(config.encoder_blocks)],
            nn.Conv2d(coarse, config.code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, coarse, 3, padding=1),
            *[ResidualBlock(coarse) for _ in range(config.decoder_blocks)],
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *[ResidualBlock(fine) for _ in range(config.decoder_blocks)],
            nn.SiLU(),
            nn.Conv2d(fine, pixels, 3, padding=1),
            nn.PixelShuffle(config.fold),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in -1..1 to vectors [B, code_dim, grid, grid]."""
        return self.encoder(pixels)

    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors [B, code_dim, grid, grid] to pixels [B, 3, S, S], about -1..1."""
        return self.decoder(vectors)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(x))), the identity at first; that, with Muon, makes norms unnecessary."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        return x + self.conv2(F.silu(self.conv1(x)))
