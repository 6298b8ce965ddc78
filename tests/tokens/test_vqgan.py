"""Chameleon's VQ-GAN: its tensors against the facts of the release, its codes against Hugging Face's."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.strips import StripEncoder
from megachameleon.tokens.vq.tokenizer import flatten
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGAN, Downsample, VQGANConfig, tensor_shapes

TINY = VQGANConfig(
    image_size=64,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=2,
    latent_channels=16,
    code_dim=16,
    num_codes=512,
)

# Name of a layer, {a,b} for either; then the shape of its weight. Every layer has a bias as long as its weight.
LAYERS = """
encoder.conv_in 128 3 3 3
encoder.down.{0,1}.block.{0,1}.norm{1,2} 128
encoder.down.{0,1}.block.{0,1}.conv{1,2} 128 128 3 3
encoder.down.2.block.0.norm1 128
encoder.down.2.block.0.conv1 256 128 3 3
encoder.down.2.block.0.nin_shortcut 256 128 1 1
encoder.down.2.block.0.norm2 256
encoder.down.2.block.0.conv2 256 256 3 3
encoder.down.2.block.1.norm{1,2} 256
encoder.down.2.block.1.conv{1,2} 256 256 3 3
encoder.down.3.block.{0,1}.norm{1,2} 256
encoder.down.3.block.{0,1}.conv{1,2} 256 256 3 3
encoder.down.4.block.0.norm1 256
encoder.down.4.block.0.conv1 512 256 3 3
encoder.down.4.block.0.nin_shortcut 512 256 1 1
encoder.down.4.block.0.norm2 512
encoder.down.4.block.0.conv2 512 512 3 3
encoder.down.4.block.1.norm{1,2} 512
encoder.down.4.block.1.conv{1,2} 512 512 3 3
encoder.down.{0,1}.downsample.conv 128 128 3 3
encoder.down.{2,3}.downsample.conv 256 256 3 3
{encoder,decoder}.mid.block_{1,2}.norm{1,2} 512
{encoder,decoder}.mid.block_{1,2}.conv{1,2} 512 512 3 3
{encoder,decoder}.mid.attn_1.norm 512
{encoder,decoder}.mid.attn_1.{q,k,v,proj_out} 512 512 1 1
encoder.norm_out 512
encoder.conv_out 256 512 3 3
decoder.conv_in 512 256 3 3
decoder.up.4.block.{0,1,2}.norm{1,2} 512
decoder.up.4.block.{0,1,2}.conv{1,2} 512 512 3 3
decoder.up.3.block.0.norm1 512
decoder.up.3.block.0.conv1 256 512 3 3
decoder.up.3.block.0.nin_shortcut 256 512 1 1
decoder.up.3.block.0.norm2 256
decoder.up.3.block.0.conv2 256 256 3 3
decoder.up.3.block.{1,2}.norm{1,2} 256
decoder.up.3.block.{1,2}.conv{1,2} 256 256 3 3
decoder.up.2.block.{0,1,2}.norm{1,2} 256
decoder.up.2.block.{0,1,2}.conv{1,2} 256 256 3 3
decoder.up.1.block.0.norm1 256
decoder.up.1.block.0.conv1 128 256 3 3
decoder.up.1.block.0.nin_shortcut 128 256 1 1
decoder.up.1.block.0.norm2 128
decoder.up.1.block.0.conv2 128 128 3 3
decoder.up.1.block.{1,2}.norm{1,2} 128
decoder.up.1.block.{1,2}.conv{1,2} 128 128 3 3
decoder.up.0.block.{0,1,2}.norm{1,2} 128
decoder.up.0.block.{0,1,2}.conv{1,2} 128 128 3 3
decoder.up.4.upsample.conv 512 512 3 3
decoder.up.{2,3}.upsample.conv 256 256 3 3
decoder.up.1.upsample.conv 128 128 3 3
decoder.norm_out 128
decoder.conv_out 3 128 3 3
{quant_conv,post_quant_conv} 256 256 1 1
"""


def facts():
    shapes = {CODEBOOK_TENSOR: (8192, 256)}
    for line in LAYERS.split("\n")[1:-1]:
        pattern, *sizes = line.split()
        parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"[{}]", pattern))]
        for name in map("".join, itertools.product(*parts)):
            shapes[f"{name}.weight"] = tuple(map(int, sizes))
            shapes[f"{name}.bias"] = (int(sizes[0]),)
    return shapes


def make_pair(config, seed=0):
    """Our network and codebook, and Hugging Face's model, with the same random weights."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    torch.manual_seed(seed)
    network, codebook = VQGAN(config).eval().requires_grad_(False), Codebook(config.num_codes, config.code_dim)
    for name, tensor in network.named_parameters():
        if "norm" in name:  # so that a swap of two norms shows
            tensor.add_(0.2 * torch.randn_like(tensor))
    codebook.codes.normal_(std=0.2)  # about as far apart as the vectors
    theirs = ChameleonVQVAE(
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
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("decoder.")}
    theirs.load_state_dict(own | {CODEBOOK_TENSOR: codebook.codes})
    return network, codebook, theirs.requires_grad_(False)


def smooth_pictures(count, size, seed=0):
    """Pixels [count, 3, size, size] in -1..1 with some likeness to pictures: coarse colours under fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, size // 16), max(2, size // 16), generator=generator) * 2 - 1
    fine = torch.rand(count, 3, size, size, generator=generator) * 0.2 - 0.1
    return (F.interpolate(coarse, size=size, mode="bicubic") + fine).clamp(-1, 1)


def shares_of_equal_codes(config, count):
    """Of the plain encoder and of that in strips."""
    network, codebook, theirs = make_pair(config)
    pixels = smooth_pictures(count, config.image_size)
    own = codebook.nearest(flatten(network.encode(pixels)))
    in_strips = codebook.nearest(flatten(StripEncoder(network, config)(pixels)))
    assert len(own.unique()) > min(40, len(own) // 8)  # else equal codes would say little
    expected = theirs.encode(pixels).image_tokens
    return [float((codes == expected).float().mean()) for codes in (own, in_strips)]


def test_the_tensors_are_those_of_the_release():
    shapes = tensor_shapes(VQGANConfig())
    assert shapes == facts()
    assert len(shapes) == 293
    assert sum(math.prod(shape) for shape in shapes.values()) == 68_718_467


def test_codes_equal_hugging_faces():
    assert min(shares_of_equal_codes(TINY, 4)) >= 0.999


def test_the_comparison_sees_padding_at_the_wrong_side(monkeypatch):
    monkeypatch.setattr(Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))
    assert shares_of_equal_codes(TINY, 4)[0] < 0.9


@pytest.mark.slow
def test_codes_equal_hugging_faces_at_full_size():
    assert min(shares_of_equal_codes(VQGANConfig(), 1)) >= 0.999


def test_pixels_to_vectors_and_back_keep_the_promised_shapes():
    network = VQGAN(TINY)
    vectors = network.encode(smooth_pictures(2, 64))
    assert vectors.shape == (2, 16, 16, 16) and TINY.grid == 16
    pixels = network.decode(vectors)
    assert pixels.shape == (2, 3, 64, 64)
    pixels.square().mean().backward()
    assert network.last_layer.grad is not None and network.last_layer.shape == (3, 32, 3, 3)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_encoder_alone_has_no_decoder():
    names = VQGAN(TINY, with_decoder=False).state_dict()
    assert not any(name.startswith("decoder.") for name in names)
    assert {name for name in VQGAN(TINY).state_dict() if not name.startswith("decoder.")} == set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 500}, "image_size=500 is not a multiple of 16; take 496 or 512"),
        ({"base_channels": 48}, "base_channels=48 is not a multiple of the 32"),
        ({"channel_multipliers": ()}, r"channel_multipliers=\(\) must be"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers=\(1, 0\) must be"),
        ({"code_dim": 0}, "code_dim=0 must be"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**change)
