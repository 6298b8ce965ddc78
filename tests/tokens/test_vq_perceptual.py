"""LPIPS and the rFID with random weights of the right shape; skipped where their packages do not import."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megachameleon.tokens.vq import perceptual
from megachameleon.tokens.vq.perceptual import FrechetDistance, PerceptualLoss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def torchvision():
    """torchvision made for CUDA does not import beside torch for the CPU: it registers meta kernels for `nms` and
    `qnms`, which only its compiled part defines. Nothing here calls them, so definitions are enough."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        module = importlib.import_module("torchvision")
        importlib.import_module("torchmetrics.image.fid")
        importlib.import_module("torch_fidelity")
    except ImportError as error:
        pytest.skip(f"needs torchmetrics, torch-fidelity and torchvision: {error}")
    yield module
    del library


@pytest.fixture(scope="module")
def vgg(torchvision, tmp_path_factory):
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return features, PerceptualLoss(path)


def test_lpips_is_that_of_its_definition(vgg):
    """Distances of normalised features after five layers of VGG-16, weighted by channel, averaged over places."""
    layers, loss = vgg
    torch.manual_seed(1)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = [(x - shift[:, None, None]) / scale[:, None, None] for x in (a, b)]
    linear = [parameter for name, parameter in loss.named_parameters() if "lin" in name]
    expected, taken = 0.0, 0
    with torch.no_grad():
        for place, layer in enumerate(layers):
            features = [layer(x) for x in features]
            if place in (3, 8, 15, 22, 29):
                difference = F.normalize(features[0], dim=1) - F.normalize(features[1], dim=1)
                expected += (difference.square() * linear[taken].view(1, -1, 1, 1)).sum(1).mean().item()
                taken += 1
        assert loss(a, b).item() == pytest.approx(expected, rel=1e-3)
        assert loss(a, a).item() == pytest.approx(0, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_lpips_has_a_gradient_for_the_drawing(vgg):
    drawn = torch.zeros(1, 3, 32, 32, requires_grad=True)
    vgg[1](drawn, torch.rand(1, 3, 32, 32)).backward()
    assert drawn.grad is not None and drawn.grad.abs().sum() > 0


@pytest.mark.slow
def test_rfid_of_equal_and_of_other_pictures(torchvision, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    state = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    path = tmp_path / "inception.pth"
    _random_inception(state, path)
    frechet = FrechetDistance(path, CPU)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    frechet.add(pictures, pictures)
    assert frechet.take() == pytest.approx(0, abs=1e-3)
    frechet.add(pictures, 255 - pictures // 4)
    assert frechet.take() > 1e-3


def _random_inception(network, path):
    """The state of an InceptionV3 as its constructor makes it, which loads a file at its end: it gets one here."""

    def keep(state):
        raise StopIteration

    network.load_state_dict = keep
    torch.save({}, path)
    with pytest.raises(StopIteration):
        type(network).__init__(network, "inception-v3-compat", ["2048"], str(path))
    made = torch.nn.Module.state_dict(network)
    torch.save({name: t * 6**0.5 if t.ndim == 4 else t for name, t in made.items()}, path)  # features that do not fade


def test_unusable_weights_are_named(torchvision, tmp_path):
    with pytest.raises(ValueError, match=r"--perceptual .*none.pth: no such file; give torchvision's vgg16"):
        PerceptualLoss(tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"--perceptual .*noise.pth: not a file of plain weights"):
        PerceptualLoss(tmp_path / "noise.pth")
    with pytest.raises(ValueError, match=r"other.pth: not VGG-16 \('features.0.weight'\)"):
        perceptual._fill(
            torch.nn.ModuleDict({"slice1": torch.nn.ModuleDict({"0": torch.nn.Conv2d(1, 1, 1)})}),
            {},
            tmp_path / "other.pth",
        )
    with pytest.raises(ValueError, match=r"--fid-weights .*none.pth: no such file; give torch-fidelity's"):
        FrechetDistance(tmp_path / "none.pth", CPU)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "fc.pth")
    with pytest.raises(ValueError, match=r"--fid-weights .*fc.pth: .*; give torch-fidelity's"):
        FrechetDistance(tmp_path / "fc.pth", CPU)


class _Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_that_would_execute_are_refused(tmp_path, capsys):
    torch.save({"weight": _Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match="not a file of plain weights"):
        perceptual._read_state(tmp_path / "harmful.pth", "--perceptual", "VGG-16")
    assert "executed" not in capsys.readouterr().out


def test_inception_is_read_from_one_kind_of_file_only(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: safetensors cannot be read here; give torch-fidelity's"):
        FrechetDistance(tmp_path / "a.safetensors", CPU)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    def no_torchvision(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", no_torchvision)
    with pytest.raises(ValueError, match=r"--perceptual: torchmetrics.*nms does not exist.*pip install torchmetrics"):
        PerceptualLoss(tmp_path / "vgg.pth")
