"""The patch discriminator: how real each patch of a picture looks (Isola et al., https://arxiv.org/abs/1611.07004)."""

from torch import Tensor, nn

NORM_GROUPS = 32
"""Of its group norms."""
LEAK = 0.2
"""Slope of its leaky ReLUs below 0, as in the original."""


class PatchDiscriminator(nn.Module):
    """Pixels [B, 3, S, S] in -1..1 to one score a patch, [B, 1, s, s]; higher is more real.

    Group norms stand where the original has batch norms, so that a score depends on its own picture only and training
    gives the same result however a batch is divided.

    Args:
        channels: after the first convolution; a multiple of 16. They double with each further one, up to eight times.
        layers: convolutions of stride 2; each doubles the side of the patches.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
        for layer in range(1, layers + 1):
            # the last one keeps the resolution, as in the original
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, widths[layer]),
                nn.LeakyReLU(LEAK),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # as pix2pix (Isola et al.) initialises its networks
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, S, S] to logits of patches."""
        return self.layers(pixels)

    @staticmethod
    def smallest_picture(layers: int) -> int:
        """Side in pixels of the smallest picture that it can score."""
        return int(3 * 2**layers)
