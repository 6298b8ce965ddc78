"""The picture encoder of a Hugging Face Chameleon (`model.vqmodel`), from a VQ-GAN of ours or another export."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachameleon.checkpoint.boxes import Shape
from megachameleon.checkpoint.formats.huggingface_files import DTYPES, read_headers
from megachameleon.checkpoint.formats.huggingface_names import CONFIG_FILE, PICTURES
from megachameleon.checkpoint.formats.plain import Piece
from megachameleon.files import read_json
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from megachameleon.tokens.vq.tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGANConfig

OUR_CODEBOOK = "codebook.codes"
DECODER = "decoder."
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
    """Tensors under transformers' names, still in their files."""

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
            Piece(name=PICTURES + name, shape=shape, dtype=dtype, cuts=())
            for name, (_, _, shape, dtype) in self.tensors.items()
        )

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the output."""
        path, stored, _, _ = self.tensors[name.removeprefix(PICTURES)]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None

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


def open_picture_encoder(path: Path, vocabulary: Vocabulary, fingerprint: str | None) -> PictureEncoder:
    """From an image tokenizer's folder.

    Args:
        fingerprint: of the one that made the data, where it is known.

    Raises:
        ValueError: it is damaged, not a VQ-GAN, another than that, or has other codes than the vocabulary.
    """
    header = read_json(path / TOKENIZER_CONFIG)
    tokenizer = ImageTokenizer.load(path)  # compares hashes
    if header["network"] != "vqgan":
        raise ValueError(
            f"{path}: is the small network of patches, and transformers' Chameleon has a VQ-GAN only; leave "
            "--image-tokenizer out and encode pictures with this project's tools"
        )
    if (tokenizer.num_codes, tokenizer.grid) != (vocabulary.num_image_codes, vocabulary.image_grid):
        raise ValueError(
            f"{path}: has {tokenizer.num_codes} codes on a grid of {tokenizer.grid}, the checkpoint's vocabulary "
            f"{vocabulary.num_image_codes} on {vocabulary.image_grid}; give the image tokenizer that made its data"
        )
    if fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{path}: is another image tokenizer ({tokenizer.fingerprint}) than the one that made the checkpoint's "
            f"data ({fingerprint}); give that one with --image-tokenizer"
        )
    file = path / TOKENIZER_WEIGHTS
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for stored in opened.keys():  # noqa: SIM118
            if not stored.startswith(DECODER):
                part = opened.get_slice(stored)
                name = CODEBOOK_TENSOR if stored == OUR_CODEBOOK else stored
                tensors[name] = file, stored, tuple(part.get_shape()), DTYPES[part.get_dtype()]
    shape = header["config"]
    settings = {
        "embed_dim": shape["code_dim"],
        "num_embeddings": shape["num_codes"],
        "double_latent": False,
        "latent_channels": shape["latent_channels"],
        "resolution": shape["image_size"],
        "in_channels": 3,
        "base_channels": shape["base_channels"],
        "channel_multiplier": list(shape["channel_multipliers"]),
        "num_res_blocks": shape["num_res_blocks"],
        "attn_resolutions": [],
        "dropout": 0.0,
        "attn_type": "vanilla",
    }
    return PictureEncoder(path, tensors, settings)


def picture_encoder_within(folder: Path) -> PictureEncoder | None:
    """The one that a Hugging Face checkpoint brings; None: it has none."""
    places, shapes, dtypes = read_headers(folder)
    tensors = {
        name.removeprefix(PICTURES): (folder / file, name, shapes[name], DTYPES[dtypes[name]])
        for name, file in places.items()
        if name.startswith(PICTURES)
    }
    settings = read_json(folder / CONFIG_FILE).get("vq_config")
    return PictureEncoder(folder, tensors, settings) if tensors and isinstance(settings, dict) else None
