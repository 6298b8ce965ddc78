"""Chameleon's VQ-GAN: the convolutional autoencoder whose tensors have the names of Meta's `vqgan.ckpt`.

The VQ-GAN of Esser et al. (https://arxiv.org/abs/2012.09841) as Chameleon configures it, with attention at the lowest
resolution only. The codebook stands apart (`quantizer.Codebook`).
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32
"""Of all group norms."""
NORM_EPSILON = 1e-6
"""Of all group norms, as in Meta's network; torch's default would be 1e-5."""
CODEBOOK_TENSOR = "quantize.embedding.weight"
"""Name of the codebook [num_codes, code_dim] in Meta's and Hugging Face's files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VQGANConfig:
    """Shape of a `VQGAN`; the defaults are Chameleon's."""

    image_size: int = 512
    """Side of a picture in pixels; a multiple of 2 ** (levels - 1)."""
    base_channels: int = 128
    """Channels at full resolution, before the multipliers; a multiple of 32."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels at each level, from full resolution down; each level halves the side of the one before."""
    num_res_blocks: int = 2
    """Residual blocks of the encoder at each level; the decoder has one more."""
    latent_channels: int = 256
    """Channels between the autoencoder and its 1x1 convolutions at the codebook."""
    code_dim: int = 256
    """Length of a code vector."""
    num_codes: int = 8192
    """Codes in the codebook."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for name in self.__slots__:
            values = getattr(self, name) if name == "channel_multipliers" else (getattr(self, name),)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.base_channels % NORM_GROUPS:
            raise ValueError(f"base_channels={self.base_channels} is not a multiple of the {NORM_GROUPS} norm groups")
        if self.image_size % self.patch:
            smaller = self.image_size // self.patch * self.patch
            choices = " or ".join(str(size) for size in (smaller, smaller + self.patch) if size)
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.patch}; take {choices}")

    @property
    def patch(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def grid(self) -> int:
        """Rows and columns of codes."""
        return self.image_size // self.patch

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at each level, from full resolution down."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


class VQGAN(nn.Module):
    """Encoder and decoder with their 1x1 convolutions at the codebook; weights start as torch initialises them.

    Args:
        with_decoder: leave it out where only codes are wanted (Hugging Face's files do not have it).
    """

    decoder: "Decoder | None"

    def __init__(self, config: VQGANConfig, *, with_decoder: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if with_decoder else None
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in -1..1 to vectors [B, code_dim, grid, grid], to be compared with the codes."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, code_dim, grid, grid] to pixels [B, 3, S, S], about -1..1."""
        assert self.decoder is not None, "made without a decoder"
        return self.decoder(self.post_quant_conv(vectors))

    @property
    def last_layer(self) -> Tensor:
        """The weight [3, channels, 3, 3] that makes pixels, whose gradients balance adversarial and other losses."""
        assert self.decoder is not None, "made without a decoder"
        return self.decoder.conv_out.weight


class Encoder(nn.Module):
    """Pixels [B, 3, S, S] to latents [B, latent_channels, grid, grid]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, after, config.num_res_blocks, downsample=level < len(channels) - 1)
            for level, (before, after) in enumerate(zip((config.base_channels, *channels[:-1]), channels, strict=True))
        )
        self.mid = Middle(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, S, S] to latents [b, channels, rows, columns]."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, grid, grid] to pixels [B, 3, S, S]; `up` is numbered as the encoder's levels."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList(
            # one block more than the encoder, as in taming-transformers' VQModel
            Level(before, after, config.num_res_blocks + 1, upsample=level > 0)
            for level, (before, after) in enumerate(zip((*channels[1:], channels[-1]), channels, strict=True))
        )
        self.norm_out = group_norm(channels[0])
        # linear to the end: Meta's network has no tanh
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [b, channels, rows, columns] to pixels [b, 3, S, S]."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next."""

    def __init__(
        self, before: int, after: int, blocks: int, *, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(after if i else before, after) for i in range(blocks))
        self.downsample = Downsample(after) if downsample else nn.Identity()
        self.upsample = Upsample(after) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] through the blocks of this level."""
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Two residual blocks around attention, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where the number of channels changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = group_norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        # Identity has no tensors, so the names stay those of Meta's file
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to [b, c_out, h, w]."""
        change = self.conv1(F.silu(self.norm1(x)))
        change = self.conv2(F.silu(self.norm2(change)))
        return self.nin_shortcut(x) + change


class Attention(nn.Module):
    """Every position attends to every other; one head over all channels, around it a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        normed = self.norm(x)
        q, k, v = (projection(normed).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the side: a 3x3 convolution of stride 2 that sees one column of zeros at the right and one row below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to half the height and width."""
        # padded at one side only, as the network was trained; symmetric padding would shift what each code sees
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: every pixel four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """The norm of this network."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)


def tensor_shapes(config: VQGANConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, the codebook's included; nothing is allocated."""
    with torch.device("meta"):
        network = VQGAN(config)
    shapes = {name: cast(tuple[int, ...], tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    return shapes | {CODEBOOK_TENSOR: (config.num_codes, config.code_dim)}
