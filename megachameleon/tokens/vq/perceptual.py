"""Networks that judge pictures, through torchmetrics: LPIPS as a training term, Inception for the rFID.

Their packages are optional and imported when asked for; their weights are files on this machine. Nothing is downloaded.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

VGG_FILE = "torchvision's vgg16-397923af.pth"
INCEPTION_FILE = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
INSTALL = "pip install torchmetrics torch-fidelity torchvision (the torchvision that belongs to this torch)"


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al., https://arxiv.org/abs/1801.03924) on VGG-16, the linear weights being torchmetrics' own.

    Args:
        weights: state of torchvision's VGG-16, as `.pth` or `.safetensors`.

    Raises:
        ValueError: the packages do not work here, or the file is not such a state.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        lpips = _imported("torchmetrics.functional.image.lpips", "--perceptual")
        state = _read_state(weights, "--perceptual", VGG_FILE)
        # The backbone is made without weights (torchmetrics would download them) and filled from the file.
        self._network = lpips._LPIPS(net="vgg", pretrained=True, pnet_rand=True, use_dropout=False)
        _fill(self._network.net, state, weights)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean distance of pictures [B, 3, S, S] in -1..1, a scalar."""
        return self._network(output, target).mean()


class FrechetDistance:
    """The Fréchet distance of Inception features between originals and reconstructions (rFID), over all processes.

    Args:
        weights: state of torch-fidelity's InceptionV3.

    Raises:
        ValueError: the packages do not work here, or the file is not such a state.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        # torch-fidelity reads the file with all that pickle allows, so it is read here first, with tensors only. A
        # .safetensors file would be read here otherwise than there.
        if weights.suffix == ".safetensors":
            raise ValueError(f"--fid-weights {weights}: safetensors cannot be read here; give {INCEPTION_FILE}")
        fid = _imported("torchmetrics.image.fid", "--fid-weights")
        _read_state(weights, "--fid-weights", INCEPTION_FILE)
        try:
            self._metric = fid.FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).to(device)
        except (RuntimeError, ModuleNotFoundError) as error:
            raise ValueError(f"--fid-weights {weights}: {_first_line(error)}; give {INCEPTION_FILE}") from None

    def add(self, pictures: Tensor, reconstructions: Tensor) -> None:
        """Take in uint8 [B, 3, S, S] of both."""
        device = self._metric.device
        self._metric.update(pictures.to(device), real=True)
        self._metric.update(reconstructions.to(device), real=False)

    def take(self) -> float:
        """The distance over all pictures of all processes since the last time; at least two pictures are needed."""
        value = float(self._metric.compute())
        self._metric.reset()
        return value


def _imported(module: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
        raise ValueError(f"{flag}: {module} does not import here ({_first_line(error)}); {INSTALL}") from None


def _read_state(path: Path, flag: str, expected: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file; give {expected}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the readers raise nearly anything
        raise ValueError(
            f"{flag} {path}: not a file of plain weights ({_first_line(error)}); give {expected}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{flag} {path}: holds something other than named tensors; give {expected}")
    return state


def _fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy `features.N.weight` to the slice that torchmetrics keeps layer N in."""
    try:
        for name, parameter in network.named_parameters():
            _, _, rest = name.partition(".")
            parameter.data.copy_(state[f"features.{rest}"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"--perceptual {path}: not VGG-16 ({_first_line(error)}); give {VGG_FILE}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
