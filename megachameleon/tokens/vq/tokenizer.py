"""`ImageTokenizer`: pictures to codes and back, with its two files."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megachameleon.files import atomic_path, read_json, sha256_of, write_json
from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.quantizer import Codebook

CONFIG_FILE = "image_tokenizer.json"
WEIGHTS_FILE = "image_tokenizer.safetensors"
FORMAT = 1
CHUNK = 64
"""Pictures that pass through the network at once."""


class ImageTokenizer:
    """Turns uint8 pictures into codes of a codebook, in raster order, and codes into pictures.

    It computes in fp32. The same call on the same machine gives the same codes; another batch size or device may, very
    rarely, turn a near tie between two codes the other way.
    """

    def __init__(self, config: PatchConfig, network: PatchAutoencoder, codebook: Codebook, fingerprint: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self._codebook = codebook
        self.image_size = config.image_size
        """Side of a picture in pixels."""
        self.grid = (config.grid, config.grid)
        """Rows and columns of codes."""
        self.num_codes = codebook.num_codes
        """Number of codes in the codebook."""
        self.fingerprint = fingerprint
        """A short hash of shape and weights, to compare tokenizers, shards and checkpoints."""

    @property
    def codes_per_image(self) -> int:
        """Number of codes in one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._codebook.codes.device

    @torch.inference_mode()
    def encode(self, pictures: Tensor | np.ndarray) -> Tensor:
        """Pictures uint8 [B, 3, image_size, image_size] to codes int64 [B, codes_per_image], on the same device.

        Raises:
            ValueError: another dtype or shape.
        """
        pictures = torch.as_tensor(pictures)
        expected = (3, self.image_size, self.image_size)
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or tuple(pictures.shape[1:]) != expected:
            raise ValueError(
                f"pictures of dtype {pictures.dtype} and shape {tuple(pictures.shape)}; "
                f"this image tokenizer takes uint8 [B, {', '.join(map(str, expected))}]"
            )
        if len(pictures) == 0:
            return torch.empty(0, self.codes_per_image, dtype=torch.int64)
        codes = [
            self._codebook.nearest(flatten(self._network.encode(to_float(chunk.to(self.device))))).view(len(chunk), -1)
            for chunk in pictures.split(CHUNK)
        ]
        return torch.cat(codes).to(pictures.device)

    @torch.inference_mode()
    def decode(self, codes: Tensor | np.ndarray) -> Tensor:
        """Codes int64 [B, codes_per_image] to pictures uint8 [B, 3, image_size, image_size], on the same device.

        Raises:
            ValueError: another shape, or a code outside the codebook.
        """
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(f"codes of shape {tuple(codes.shape)}; expected [B, {self.codes_per_image}]")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} are outside 0..{self.num_codes - 1}")
        if len(codes) == 0:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        pictures = [
            to_uint8(self._network.decode(unflatten(self._codebook.lookup(chunk.to(self.device)), self.grid)))
            for chunk in codes.long().split(CHUNK)
        ]
        return torch.cat(pictures).to(codes.device)

    @classmethod
    def load(cls, folder: Path, device: torch.device = torch.device("cpu")) -> "ImageTokenizer":  # noqa: B008
        """Read an image tokenizer that `save_image_tokenizer` wrote.

        Raises:
            ValueError: a file is missing, damaged, or does not match the other.
        """
        folder = Path(folder)
        header = read_json(folder / CONFIG_FILE)
        config, num_codes, weights_hash = _parse_header(header, folder / CONFIG_FILE)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            raise ValueError(f"{weights}: no such file; train the image tokenizer again or copy both of its files")
        if sha256_of(weights) != weights_hash:
            raise ValueError(f"{weights}: does not match {CONFIG_FILE} beside it; copy both files again")
        network, codebook = PatchAutoencoder(config), Codebook(num_codes, config.code_dim)
        try:
            tensors = load_file(weights)
            codebook.load_state_dict({"codes": tensors.pop("codebook.codes")})
            network.load_state_dict(tensors)
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise ValueError(f"{weights}: not the weights that {CONFIG_FILE} describes ({error})") from None
        return cls(config, network.to(device), codebook.to(device), _fingerprint(header))


def save_image_tokenizer(
    folder: Path, config: PatchConfig, network: PatchAutoencoder, codebook: Codebook, provenance: dict[str, Any]
) -> None:
    """Write the weights, then the JSON file that describes them and marks them complete.

    Args:
        provenance: plain values that say how it was made; kept, not interpreted.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
    tensors["codebook.codes"] = codebook.codes.detach().contiguous().cpu()
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    header = {
        "format": FORMAT,
        "network": "patch",
        "config": asdict(config),
        "num_codes": codebook.num_codes,
        "weights_sha256": sha256_of(folder / WEIGHTS_FILE),
        "provenance": provenance,
    }
    write_json(folder / CONFIG_FILE, header)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pictures.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255, rounded and clamped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flatten(vectors: Tensor) -> Tensor:
    """[B, C, rows, columns] to [B * rows * columns, C], fp32, raster order."""
    return vectors.float().permute(0, 2, 3, 1).reshape(-1, vectors.shape[1])


def unflatten(vectors: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B * rows * columns, C] or [B, rows * columns, C] to [B, C, rows, columns]."""
    return vectors.reshape(-1, *grid, vectors.shape[-1]).permute(0, 3, 1, 2)


def _parse_header(header: Any, path: Path) -> tuple[PatchConfig, int, str]:
    try:
        if (header["format"], header["network"]) != (FORMAT, "patch"):
            raise ValueError(f"format {header['format']} of network {header['network']!r} is unknown to this version")
        return PatchConfig(**header["config"]), int(header["num_codes"]), str(header["weights_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not describe an image tokenizer ({error}); train it again") from None


def _fingerprint(header: dict[str, Any]) -> str:
    identity = {name: value for name, value in header.items() if name != "provenance"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
