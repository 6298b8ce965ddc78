"""The picture encoder of a Hugging Face Chameleon (`model.vqmodel`), from a VQ-GAN of ours or another export."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megachameleon.checkpoint.boxes import Shape
from megachameleon.checkpoint.formats.huggingface.files import (
    DTYPES,
    file_state,
    open_tensor,
    read_headers,
    widest_dtype,
)
from megachameleon.checkpoint.formats.huggingface.names import CONFIG_FILE, PICTURES
from megachameleon.checkpoint.formats.plain import Piece, require_tensors
from megachameleon.files import read_json
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from megachameleon.tokens.vq.tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGANConfig, tensor_shapes

OUR_CODEBOOK = "codebook.codes"
DECODER = "decoder."
MOST_CHANNELS, MOST_CODES, MOST_BLOCKS = 1 << 14, 1 << 24, 256
"""What `vq_config` may say: even to name the tensors of a network that is far larger takes all time and memory."""
BESIDE = "image_tokenizer"
"""Folder in the export with encoder and decoder, which transformers does not have."""
SMALLEST: dict[str, Any] = {
    "embed_dim": 32,
    "num_embeddings": 4,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "resolution": 32,
}
"""transformers always builds an encoder; where none comes along it should cost nothing."""


@dataclass(frozen=True)
class PictureEncoder:
    """Tensors under transformers' names, still in their files; none of a network that transformers does not have."""

    origin: Path
    tensors: dict[str, tuple[Path, str, Shape, torch.dtype]]
    """File, name in it, shape and type."""
    settings: dict[str, Any]
    """For `vq_config`."""

    @property
    def image_size(self) -> int:
        """Side of its pictures in pixels."""
        return self.settings.get("resolution", VQGANConfig().image_size)

    @property
    def has_decoder(self) -> bool:
        """Whether an image tokenizer that draws goes with it."""
        source = self._image_tokenizer()
        return source is not None and bool(read_json(source / TOKENIZER_CONFIG).get("can_decode", True))

    def pieces(self) -> tuple[Piece, ...]:
        """What goes into the output's files, in its own precision: in bf16 other codes would come out."""
        return tuple(
            Piece(name=PICTURES + name, shape=shape, dtype=dtype, cuts=(), read_from=_place(path))
            for name, (path, _, shape, dtype) in self.tensors.items()
        )

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the output."""
        path, stored, _, _ = self.tensors[name.removeprefix(PICTURES)]
        return open_tensor(path, stored)

    def copy_beside(self, folder: Path) -> None:
        """Ship the image tokenizer, decoder included, where it is one of ours or came with one."""
        source = self._image_tokenizer()
        if source is not None:
            (folder / BESIDE).mkdir(exist_ok=True)
            for name in (TOKENIZER_CONFIG, TOKENIZER_WEIGHTS):
                shutil.copyfile(source / name, folder / BESIDE / name)

    def _image_tokenizer(self) -> Path | None:
        places = (self.origin, self.origin / BESIDE)
        return next((place for place in places if (place / TOKENIZER_CONFIG).is_file()), None)


def _place(path: Path) -> str:
    return f"{path.absolute().parent} {file_state(path)}"


def open_picture_encoder(path: Path, vocabulary: Vocabulary, fingerprint: str | None) -> PictureEncoder:
    """From an image tokenizer's folder.

    Args:
        fingerprint: of the one that made the data, where it is known.

    Raises:
        ValueError: it is damaged, another than that, or has other codes than the vocabulary.
    """
    header = read_json(path / TOKENIZER_CONFIG)
    tokenizer = ImageTokenizer.load(path)  # compares hashes
    _require_same_codes(path, tokenizer.num_codes, tokenizer.grid, vocabulary)
    if fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{path}: is another image tokenizer ({tokenizer.fingerprint}) than the one that made the checkpoint's "
            f"data ({fingerprint}); give that one with --image-tokenizer"
        )
    if header["network"] != "vqgan":
        return PictureEncoder(path, {}, SMALLEST)
    file = path / TOKENIZER_WEIGHTS
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for stored in opened.keys():  # noqa: SIM118
            if not stored.startswith(DECODER):
                part = opened.get_slice(stored)
                # transformers keeps the codebook as the weight of an embedding.
                name = CODEBOOK_TENSOR if stored == OUR_CODEBOOK else stored
                tensors[name] = file, stored, tuple(part.get_shape()), DTYPES[part.get_dtype()]
    return PictureEncoder(path, tensors, _settings(VQGANConfig(**header["config"])))


def picture_encoder_within(folder: Path, vocabulary: Vocabulary | None) -> PictureEncoder | None:
    """The one that a Hugging Face checkpoint brings; None: it has none.

    Raises:
        ValueError: tensors are missing, unknown or of another shape; or it has other codes than the vocabulary.
    """
    places, shapes, dtypes = read_headers(folder)
    names = {name.removeprefix(PICTURES): name for name in places if name.startswith(PICTURES)}
    if not names:
        beside = (folder / BESIDE / TOKENIZER_CONFIG).is_file()
        return PictureEncoder(folder, {}, SMALLEST) if beside else None
    given = read_json(folder / CONFIG_FILE).get("vq_config") or {}
    config = _shape(folder / CONFIG_FILE, given)
    wanted = {PICTURES + name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(DECODER)}
    require_tensors(folder, {n: shapes[n] for n in names.values() if not n.startswith(PICTURES + DECODER)}, wanted)
    if vocabulary is not None:
        _require_same_codes(folder, config.num_codes, (config.grid, config.grid), vocabulary)
    tensors = {
        name: (folder / places[stored], stored, shapes[stored], widest_dtype(folder, {dtypes[stored]}))
        for name, stored in names.items()
    }
    return PictureEncoder(folder, tensors, {**_settings(config), **given})


def _require_same_codes(origin: Path, num_codes: int, grid: tuple[int, int], vocabulary: Vocabulary) -> None:
    if (num_codes, grid) != (vocabulary.num_image_codes, vocabulary.image_grid):
        raise ValueError(
            f"{origin}: has {num_codes} codes on a grid of {grid}, the checkpoint's vocabulary "
            f"{vocabulary.num_image_codes} on {vocabulary.image_grid}; give the image tokenizer that made its data"
        )


def _settings(config: VQGANConfig) -> dict[str, Any]:
    """`vq_config` of a VQ-GAN."""
    return {
        "embed_dim": config.code_dim,
        "num_embeddings": config.num_codes,
        "double_latent": False,
        "latent_channels": config.latent_channels,
        "resolution": config.image_size,
        "in_channels": 3,
        "base_channels": config.base_channels,
        "channel_multiplier": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
        "attn_type": "vanilla",
    }


def _shape(path: Path, given: Any) -> VQGANConfig:
    """The VQ-GAN that a `vq_config` describes; what it leaves out is Chameleon's."""
    names = {
        "embed_dim": "code_dim",
        "num_embeddings": "num_codes",
        "latent_channels": "latent_channels",
        "resolution": "image_size",
        "base_channels": "base_channels",
        "channel_multiplier": "channel_multipliers",
        "num_res_blocks": "num_res_blocks",
    }
    try:
        if not isinstance(given, dict):
            raise TypeError(f"a {type(given).__name__}")
        config = VQGANConfig(**{ours: given[theirs] for theirs, ours in names.items() if theirs in given})
        _require_buildable(config)
        return config
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: vq_config is not that of a VQ-GAN ({error}); copy it again") from None


def _require_buildable(config: VQGANConfig) -> None:
    """Raise ValueError for sizes that no network has; `VQGANConfig` itself trusts whoever makes one."""
    channels = (config.base_channels, *config.channel_multipliers, config.latent_channels, config.code_dim)
    numbers = (*channels, config.image_size, config.num_codes, config.num_res_blocks)
    if wrong := [number for number in numbers if type(number) is not int]:
        raise ValueError(f"{wrong[0]!r} is not a whole number")
    blocks = config.num_res_blocks * len(config.channel_multipliers)
    if max(channels) > MOST_CHANNELS or config.num_codes > MOST_CODES or blocks > MOST_BLOCKS:
        raise ValueError(f"channels {channels}, {config.num_codes} codes and {blocks} blocks are no network's")
