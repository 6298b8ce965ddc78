"""The encoder in strips against the plain one."""

import pytest
import torch

from megachameleon.tokens.vq import strips
from megachameleon.tokens.vq.strips import Activation, StripEncoder, strip_height
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    image_size=48, base_channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=2, latent_channels=8, code_dim=8
)


def make_network():
    torch.manual_seed(0)
    network = VQGAN(CONFIG).eval().requires_grad_(False)
    for name, tensor in network.named_parameters():
        if "norm" in name:
            tensor.add_(0.2 * torch.randn_like(tensor))
    return network


def pixels(count):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("height", [1, 5, 48])
def test_strips_compute_what_the_plain_encoder_does(monkeypatch, height):
    """At full resolution; lower down strips are higher."""
    monkeypatch.setattr(strips, "STRIP_BYTES", height * 4 * 48 * 32)
    assert strip_height(48, 32) == height
    network = make_network()
    with torch.inference_mode():
        plain, ours = network.encode(pixels(2)), StripEncoder(network, CONFIG)(pixels(2))
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def test_bf16_is_about_as_near_as_autocast():
    network = make_network()
    with torch.inference_mode():
        exact, ours = network.encode(pixels(2)), StripEncoder(network, CONFIG, torch.bfloat16)(pixels(2))
        with torch.autocast("cpu", torch.bfloat16):
            theirs = network.encode(pixels(2)).float()
    distance, allowed = (ours - exact).square().mean(), (theirs - exact).square().mean()
    assert ours.dtype == torch.float32
    assert 0 < distance < 1.5 * allowed


def test_moments_are_those_of_the_whole():
    values = torch.randn(10, 7, 32, generator=torch.Generator().manual_seed(0)) + 100  # far from zero
    activation = Activation(torch.empty(10, 7, 32))
    for top in range(0, 10, 3):
        activation.put(top, values[top : top + 3])
    assert torch.equal(activation.values, values)
    torch.testing.assert_close(activation.mean, values.double().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(activation.deviations / 70, values.double().var((0, 1), correction=0), rtol=1e-4, atol=0)
