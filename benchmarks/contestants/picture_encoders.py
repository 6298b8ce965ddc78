"""Ways from pictures to the codes of Chameleon's VQ-GAN, all with the same random weights."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import flatten, to_float
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGAN, VQGANConfig

Encoder = Callable[[Tensor], Tensor]
"""Pictures uint8 [B, 3, S, S] to codes int64 [B, codes]."""

NORM_SPREAD, CODE_SPREAD = 0.2, 0.2
"""Norms scatter, so that a swap of two shows; codes lie about as far apart as the vectors of an untrained encoder."""


class Weights:
    """A network and a codebook, drawn from a seed."""

    def __init__(self, config: VQGANConfig, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config, self.device = config, device
        self.network = VQGAN(config, with_decoder=False).requires_grad_(False)
        self.codebook = Codebook(config.num_codes, config.code_dim)
        for name, tensor in self.network.named_parameters():
            if "norm" in name:
                tensor.add_(NORM_SPREAD * torch.randn_like(tensor))
        self.codebook.codes.normal_(std=CODE_SPREAD)
        self.network, self.codebook = self.network.to(device).eval(), self.codebook.to(device)


def ours(weights: Weights, precision: str = "fp32") -> Encoder:
    """`ImageTokenizer.encode`."""
    return ImageTokenizer(weights.config, weights.network, weights.codebook, "benchmark", precision=precision).encode


def ours_bf16(weights: Weights) -> Encoder:
    """The same in bf16."""
    return ours(weights, "bf16")


def ours_plain(weights: Weights) -> Encoder:
    """`VQGAN.encode` and `Codebook.nearest`, layer by layer."""

    def encode(pictures: Tensor) -> Tensor:
        vectors = weights.network.encode(to_float(pictures.to(weights.device)))
        return weights.codebook.nearest(flatten(vectors)).view(len(pictures), -1)

    return encode


def huggingface(weights: Weights, dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> Encoder:
    """Transformers' `ChameleonVQVAE` as it ships, eager."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = weights.config
    model = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            resolution=config.image_size,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multipliers),
            num_res_blocks=config.num_res_blocks,
            latent_channels=config.latent_channels,
            embed_dim=config.code_dim,
            num_embeddings=config.num_codes,
        )
    )
    model.load_state_dict(weights.network.state_dict() | {CODEBOOK_TENSOR: weights.codebook.codes})
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network: nn.Module = model.requires_grad_(False).to(weights.device, dtype, memory_format=layout)

    def encode(pictures: Tensor) -> Tensor:
        pixels = to_float(pictures.to(weights.device)).to(dtype, memory_format=layout)
        codes: Tensor = network.encode(pixels).image_tokens
        return codes.view(len(pictures), -1)

    return encode


def huggingface_channels_last(weights: Weights) -> Encoder:
    """The same with channels last."""
    return huggingface(weights, channels_last=True)


def huggingface_bf16(weights: Weights) -> Encoder:
    """The same with all of it in bf16 and channels last, as a bf16 model has it."""
    return huggingface(weights, torch.bfloat16, channels_last=True)


BUILDERS: Mapping[str, Callable[[Weights], Encoder]] = MappingProxyType(
    {
        "ours": ours,
        "ours-bf16": ours_bf16,
        "ours-plain": ours_plain,
        "huggingface": huggingface,
        "huggingface-channels-last": huggingface_channels_last,
        "huggingface-bf16": huggingface_bf16,
    }
)
