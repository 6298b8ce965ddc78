import pytest
import torch
import torch.nn.functional as F

from megachameleon.tokens.vq.averaging import AveragedWeights
from megachameleon.tokens.vq.discriminator import PatchDiscriminator
from megachameleon.tokens.vq.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradients_at_output,
    reconstruction_terms,
)


def test_reconstruction_terms_of_known_pictures():
    target = torch.zeros(1, 3, 2, 2)
    output = torch.tensor([[0.0, 1.0], [0.0, -3.0]]).expand(1, 3, 2, 2)
    terms = {name: term.item() for name, term in reconstruction_terms(output, target).items()}
    assert terms == pytest.approx({"l1": 1.0, "l2": 2.5, "edge": (1 + 3) / 2 + (0 + 4) / 2})


def test_hinge_losses_of_known_scores():
    real, drawn = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert discriminator_loss(real, drawn).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))
    assert generator_loss(drawn).item() == pytest.approx(-1 / 3)


def test_the_adaptive_weight_is_a_ratio_of_gradients_and_bounded():
    reconstruction, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight(reconstruction, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), adversarial).item() == 0


def test_gradients_at_the_output_do_not_touch_what_made_the_loss():
    weight, output = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert gradients_at_output((2 * weight * output).sum(), output).tolist() == [2, 2, 2]
    assert weight.grad is None and output.grad is None


def test_a_patch_score_depends_on_its_own_picture_and_patch():
    torch.manual_seed(0)
    network = PatchDiscriminator(32, 2)
    pictures = torch.randn(2, 3, 16, 16)
    scores = network(pictures)
    assert scores.shape == (2, 1, 2, 2)
    assert torch.allclose(network(pictures[:1]), scores[:1], atol=1e-6)
    assert network(torch.randn(1, 3, 12, 12)).shape[-1] == 1 and PatchDiscriminator.smallest_picture(2) == 12


def test_averaged_weights_follow_the_formula():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = AveragedWeights(layer, decay=0.5)
    layer.weight.data.fill_(1.0)
    average.update(layer, step=0)  # 1 of 10 stays
    assert average.network.weight.item() == pytest.approx(0.9)
    layer.weight.data.fill_(2.0)
    average.update(layer, step=1000)  # the decay
    assert average.network.weight.item() == pytest.approx(1.45)
    assert F.linear(torch.ones(1), average.network.weight).requires_grad is False
