"""`ImageTokenizer`: pictures to codes and back by either network, with its two files."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from megachameleon.tokens.vq.strips import StripEncoder
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

Shape = PatchConfig | VQGANConfig
Network = PatchAutoencoder | VQGAN

CONFIG_FILE = "image_tokenizer.json"
"""Written last: without it there is no tokenizer."""
WEIGHTS_FILE = "image_tokenizer.safetensors"
"""fp32, whatever it computes in."""
FORMAT = 1
"""Of the two files."""
PRECISIONS = ("fp32", "bf16")
PATCH_BATCH = 16
"""Pictures that pass through a `PatchAutoencoder` at once."""
VQGAN_BATCH = 32
"""Pictures that pass through a `VQGAN` at once on CUDA, where they fit half of its memory."""


class ImageTokenizer:
    """Turns uint8 pictures into codes of a codebook, in raster order, and codes into pictures.

    Pictures pass through the network in batches of one size, filled up with black ones, so the codes of a picture do
    not depend on its company: the same picture on the same machine gets the same codes. Another device or number of
    threads may, very rarely, turn a near tie between two codes the other way.

    Args:
        precision: `fp32` (never TF32) or `bf16`, of the network; distances to codes are always fp32. On a CPU only the
            convolutions of the VQ-GAN's encoder are in bf16, and its decoder is in fp32.
    """

    def __init__(
        self, config: Shape, network: Network, codebook: Codebook, fingerprint: str, *, precision: str = "fp32"
    ) -> None:
        self._network = network.eval().requires_grad_(False)
        self._codebook = codebook
        self.image_size = config.image_size
        """Side of a picture in pixels."""
        self.grid = (config.grid, config.grid)
        """Rows and columns of codes."""
        self.num_codes = codebook.num_codes
        """Number of codes in the codebook."""
        self.fingerprint = fingerprint
        """A short hash of shape, weights and precision, to compare tokenizers, shards and checkpoints."""
        self.precision = precision
        """`fp32` or `bf16`."""
        self._strips: StripEncoder | None = None
        if isinstance(network, VQGAN) and isinstance(config, VQGANConfig) and self.device.type == "cpu":
            self._strips = StripEncoder(network, config, torch.bfloat16 if precision == "bf16" else torch.float32)
        elif precision == "bf16":
            self._network = copy.deepcopy(network).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = next(self._network.parameters()).dtype
        self.can_decode = _has_decoder(network)
        """False where the weights came without a decoder: it makes codes, but cannot draw them."""
        self.encode_batch = _batch(config, self.device)
        """Pictures that pass through the network at once here; more in a call are encoded one batch after the other."""

    @property
    def codes_per_image(self) -> int:
        """Number of codes in one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._codebook.codes.device

    def twin(self) -> "ImageTokenizer":
        """One for another thread, which shares the weights."""
        twin = copy.copy(self)
        twin._strips = self._strips.twin() if self._strips is not None else None
        return twin

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
        codes = torch.empty(len(pictures), self.codes_per_image, dtype=torch.int64, device=self.device)
        with without_tf32():
            for start in range(0, len(pictures), self.encode_batch):
                chunk = pictures[start : start + self.encode_batch].to(self.device)
                codes[start : start + self.encode_batch] = self._encode_chunk(chunk)
        return codes.to(pictures.device)

    @torch.inference_mode()
    def decode(self, codes: Tensor | np.ndarray) -> Tensor:
        """Codes int64 [B, codes_per_image] to pictures uint8 [B, 3, image_size, image_size], on the same device.

        Raises:
            ValueError: another shape, a code outside the codebook, or weights without a decoder.
        """
        if not self.can_decode:
            raise ValueError(
                "this image tokenizer was imported without a decoder (Hugging Face's files leave it out), so it makes "
                "codes and cannot draw them; import Meta's vqgan.ckpt instead"
            )
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(f"codes of shape {tuple(codes.shape)}; expected [B, {self.codes_per_image}]")
        # torch's lookup on CUDA would end the process by an assertion
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} are outside 0..{self.num_codes - 1}")
        size = (len(codes), 3, self.image_size, self.image_size)
        pictures = torch.empty(size, dtype=torch.uint8, device=self.device)
        with without_tf32():
            for start in range(0, len(codes), self.encode_batch):
                chunk = codes[start : start + self.encode_batch].long().to(self.device)
                vectors = unflatten(self._codebook.lookup(chunk), self.grid).to(self._dtype)
                pictures[start : start + self.encode_batch] = to_uint8(self._network.decode(vectors))
        return pictures.to(codes.device)

    def _encode_chunk(self, pictures: Tensor) -> Tensor:
        # kernels are chosen by batch size, and another one may round otherwise
        missing = self.encode_batch - len(pictures)
        batch = torch.cat([pictures, pictures.new_zeros(missing, *pictures.shape[1:])]) if missing else pictures
        indices = self._codebook.nearest(flatten(self._vectors(to_float(batch))))
        return indices.view(self.encode_batch, -1)[: len(pictures)]

    def _vectors(self, pixels: Tensor) -> Tensor:
        return self._network.encode(pixels.to(self._dtype)) if self._strips is None else self._strips(pixels)

    @classmethod
    def load(cls, folder: Path, device: torch.device = torch.device("cpu")) -> "ImageTokenizer":  # noqa: B008
        """Read an image tokenizer that `save_image_tokenizer` wrote.

        Raises:
            ValueError: a file is missing, damaged, or does not match the other.
        """
        folder = Path(folder)
        header = read_json(folder / CONFIG_FILE)
        parsed = _parse_header(header, folder / CONFIG_FILE)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            raise ValueError(f"{weights}: no such file; train the image tokenizer again or copy both of its files")
        if sha256_of(weights) != parsed.weights_sha256:
            raise ValueError(f"{weights}: does not match {CONFIG_FILE} beside it; copy both files again")
        with torch.device("meta"):
            network = parsed.make_network()
        try:
            codebook = Codebook(parsed.num_codes, parsed.config.code_dim)
            tensors = load_file(weights)
            # loading with assign would take over any other type
            if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
                raise ValueError("not all of them are fp32")
            codebook.load_state_dict({"codes": tensors.pop("codebook.codes")})
            network.load_state_dict(tensors, assign=True)
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{weights}: not the weights that {CONFIG_FILE} describes ({error})") from None
        network, codebook, fingerprint = network.to(device), codebook.to(device), _fingerprint(header)
        return cls(parsed.config, network, codebook, fingerprint, precision=parsed.precision)


def save_image_tokenizer(
    folder: Path,
    config: Shape,
    network: Network,
    codebook: Codebook,
    provenance: dict[str, Any],
    *,
    precision: str = "fp32",
) -> None:
    """Write the weights, then the JSON file that describes them and marks them complete.

    Args:
        provenance: plain values that say how it was made; kept, not interpreted.
        precision: in which it is to compute; the weights are fp32 in any case.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be {' or '.join(PRECISIONS)}")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
    tensors["codebook.codes"] = codebook.codes.detach().contiguous().cpu()
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    header = {
        "format": FORMAT,
        "network": "vqgan" if isinstance(network, VQGAN) else "patch",
        "config": asdict(config),
        "num_codes": codebook.num_codes,
        "precision": precision,
        "can_decode": _has_decoder(network),
        "weights_sha256": sha256_of(folder / WEIGHTS_FILE),
        "provenance": provenance,
    }
    write_json(folder / CONFIG_FILE, header)


@contextmanager
def without_tf32() -> Iterator[None]:
    """torch allows TF32 in convolutions on CUDA; the setting is the process's, so it is put back."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pictures.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255, rounded and clamped."""
    # Meta's release truncates here; rounding halves the mean error
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flatten(vectors: Tensor) -> Tensor:
    """[B, C, rows, columns] to [B * rows * columns, C], fp32, raster order."""
    return vectors.float().permute(0, 2, 3, 1).reshape(-1, vectors.shape[1])


def unflatten(vectors: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B * rows * columns, C] or [B, rows * columns, C] to [B, C, rows, columns]."""
    return vectors.reshape(-1, *grid, vectors.shape[-1]).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class _Header:
    config: Shape
    num_codes: int
    precision: str
    can_decode: bool
    weights_sha256: str

    def make_network(self) -> Network:
        if isinstance(self.config, VQGANConfig):
            return VQGAN(self.config, with_decoder=self.can_decode)
        return PatchAutoencoder(self.config)


def _parse_header(header: Any, path: Path) -> _Header:
    """Folders from before there were precisions and networks without decoder do not name them."""
    shapes = {"patch": PatchConfig, "vqgan": VQGANConfig}
    try:
        if header["format"] != FORMAT or header["network"] not in shapes:
            raise ValueError(f"format {header['format']} of network {header['network']!r} is unknown to this version")
        parsed = _Header(
            config=shapes[header["network"]](**header["config"]),
            num_codes=int(header["num_codes"]),
            precision=str(header.get("precision", "fp32")),
            can_decode=bool(header.get("can_decode", True)),
            weights_sha256=str(header["weights_sha256"]),
        )
        if parsed.precision not in PRECISIONS:
            raise ValueError(f"precision {parsed.precision!r} is unknown to this version")
        if isinstance(parsed.config, VQGANConfig) and parsed.config.num_codes != parsed.num_codes:
            raise ValueError(f"num_codes {parsed.num_codes}, but {parsed.config.num_codes} in config")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not describe an image tokenizer ({error}); train it again") from None
    return parsed


def _has_decoder(network: Network) -> bool:
    return not isinstance(network, VQGAN) or network.decoder is not None


def _batch(config: Shape, device: torch.device) -> int:
    if isinstance(config, PatchConfig):
        return PATCH_BATCH
    # strips are computed picture by picture
    if device.type != "cuda":
        return 1
    # Four activations of full resolution live at once.
    needed = 4 * 4 * config.base_channels * config.image_size**2
    return max(1, min(VQGAN_BATCH, torch.cuda.get_device_properties(device).total_memory // (2 * needed)))


def _fingerprint(header: dict[str, Any]) -> str:
    # weights enter by their SHA-256; who made them does not change a code
    identity = {name: value for name, value in header.items() if name != "provenance"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
