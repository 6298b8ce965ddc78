"""Writing Chameleon as transformers' `ChameleonForConditionalGeneration.from_pretrained` wants it."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.formats.huggingface.config import is_chameleon
from megachameleon.checkpoint.formats.huggingface.names import (
    CONFIG_FILE,
    GENERATION_FILE,
    IMAGE_PROCESSOR_FILE,
    INDEX_FILE,
    PICTURES,
    PROCESSOR_FILE,
    QK_NORM_EPS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    model_settings,
    name_in_huggingface,
    num_heads,
    shape_in_huggingface,
    vocabulary_map,
)
from megachameleon.checkpoint.formats.huggingface.pictures import SMALLEST, PictureEncoder
from megachameleon.checkpoint.formats.huggingface.processor import image_processor_settings, processor_settings
from megachameleon.checkpoint.formats.plain import (
    EXTRA_FILE,
    Description,
    Digests,
    OutputFile,
    Piece,
    plain_shapes,
    whole,
)
from megachameleon.checkpoint.formats.writing import file_order, write_safetensors
from megachameleon.files import read_json, write_json
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.huggingface import export_text_tokenizer
from megachameleon.tokens.text.piece_names import IMAGE_PLACEHOLDER
from megachameleon.tokens.vocabulary import Vocabulary

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class HuggingFaceSink:
    """Safetensors files with an index, configuration, and what goes beside them."""

    description: Description
    dtype: torch.dtype
    tokenizer: Path | None = None
    """Folder of the text tokenizer, ours; or of another export, whose files are copied."""
    pictures: PictureEncoder | None = None
    shard_bytes: int = SHARD_BYTES
    """Most that a file holds, unless one tensor is larger."""

    def __post_init__(self) -> None:
        model, origin = self.description.model, self.description.origin
        if model.qk_norm != "layernorm":
            raise ValueError(
                f"{origin}: model.qk_norm={model.qk_norm}, and transformers' Chameleon has layernorm only; such a "
                "model stays with --to megatron"
            )
        if model.norm_eps != QK_NORM_EPS:
            raise ValueError(
                f"{origin}: model.norm_eps={model.norm_eps}, while transformers' QK-norm has {QK_NORM_EPS}; exported "
                "logits would be others"
            )
        if self.description.vocabulary is None:
            raise ValueError(f"{origin}: does not say what its ids mean; give --tokenizer with its text tokenizer")
        beside = [name for name in TOKENIZER_FILES if name.endswith(".json")] if self.tokenizer is not None else []
        for path in (origin / GENERATION_FILE, *((self.tokenizer or origin) / name for name in beside)):
            _mapping(path)  # they are needed when all else is written, which is late to find them damaged

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        assert self.description.vocabulary is not None
        return Vocabulary.from_dict(self.description.vocabulary, origin=str(self.description.origin))

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sink`."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.tokenizer is None:
            yield "no text tokenizer beside it, nor a processor: give its folder with --tokenizer"
        if self.pictures is None:
            yield (
                "no picture encoder (model.vqmodel): transformers starts it at random and says so, so give it text and "
                "picture codes only, or a VQ-GAN's folder with --image-tokenizer"
            )
        elif not self.pictures.tensors:
            yield (
                "no picture encoder (model.vqmodel) and no processor: transformers does not have the small network of "
                "patches, which lies in image_tokenizer/ instead; give the model codes, and draw them, with that"
            )
        elif not self.pictures.has_decoder:
            yield (
                "no picture decoder (image_tokenizer/): Hugging Face's files leave it out; to draw pictures, give "
                "--image-tokenizer with a folder that tools/import_tokenizer.py image made of Meta's vqgan.ckpt"
            )

    def files(self) -> list[OutputFile]:
        """See `Sink`."""
        files = self._shards()
        if len(files) == 1:
            return [OutputFile(name=WEIGHTS_FILE, pieces=file_order(files[0]))]
        return [
            OutputFile(name=f"model-{i + 1:05d}-of-{len(files):05d}.safetensors", pieces=file_order(pieces))
            for i, pieces in enumerate(files)
        ]

    def _shards(self) -> list[tuple[Piece, ...]]:
        shards: list[tuple[Piece, ...]] = [()]
        size = 0
        for piece in self._pieces():
            more = torch.Size(piece.shape).numel() * piece.dtype.itemsize
            if shards[-1] and size + more > self.shard_bytes:
                shards.append(())
                size = 0
            shards[-1] += (piece,)
            size += more
        return shards

    def _pieces(self) -> Iterator[Piece]:
        model = self.description.model
        for name, shape in plain_shapes(model).items():
            yield Piece(
                name=name_in_huggingface(name),
                shape=shape_in_huggingface(model, name, shape),
                dtype=self.dtype,
                cuts=(whole(name, shape),),
            )
        if self.pictures is not None:
            yield from self.pictures.pieces()

    def make(self, piece: Piece, parts: Sequence[Tensor]) -> Tensor:
        """See `Sink`: QK-norm's vectors are repeated for each head of their group."""
        if piece.name.startswith(PICTURES):
            assert self.pictures is not None
            return self.pictures.read(piece.name)
        (values,) = parts
        if len(piece.shape) == 2 and "_norm." in piece.cuts[0].name:
            values = values.repeat_interleave(num_heads(self.description.model, piece.cuts[0].name) // len(values), 0)
        return values.to(piece.dtype)

    def write(self, path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
        """See `Sink`."""
        return write_safetensors(path, pieces, tensors)

    def finish(self, folder: Path, digests: Mapping[str, Digests]) -> None:
        """See `Sink`."""
        files = self.files()
        if len(files) > 1:
            weight_map = {piece.name: file.name for file in files for piece in file.pieces}
            size = sum(file.num_bytes for file in files)
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        pieces = self._write_tokenizer(folder)
        write_json(folder / CONFIG_FILE, self._settings(pieces))
        write_json(folder / GENERATION_FILE, self._generation_settings())
        self._write_processor(folder)
        if self.pictures is not None:
            self.pictures.copy_beside(folder)
        extra = {
            "vocabulary": self.description.vocabulary,
            "tokenizers": dict(self.description.tokenizers),
            "lineage": dict(self.description.lineage),
            "sha256": {name: found["sha256"] for name, found in digests.items()},
        }
        write_json(folder / EXTRA_FILE, extra)

    def _settings(self, names: dict[str, int]) -> dict[str, Any]:
        return {
            **model_settings(self.description.model, self.vocabulary),
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocabulary_map": names,
            "vq_config": self.pictures.settings if self.pictures else SMALLEST,
        }

    def _generation_settings(self) -> dict[str, Any]:
        """The source's own, with the ids of its vocabulary; more ids that end a text are kept."""
        origin, vocabulary = self.description.origin, self.vocabulary
        path = origin / GENERATION_FILE
        known = _mapping(path) if is_chameleon(origin) else {}
        ids: dict[str, Any] = {
            "bos_token_id": vocabulary.bos,
            "pad_token_id": vocabulary.pad,
            "eos_token_id": vocabulary.eos,
        }
        ends = known.get("eos_token_id")
        if isinstance(ends, list) and vocabulary.eos in ends:
            ids["eos_token_id"] = ends
        return {**known, **ids}

    def _write_tokenizer(self, folder: Path) -> dict[str, int]:
        """Returns the names of its pieces, for `vocabulary_map`."""
        if self.tokenizer is not None and not is_chameleon(self.tokenizer):
            export_text_tokenizer(TextTokenizer.load(self.tokenizer), folder)
            return vocabulary_map(self.vocabulary, read_json(folder / TOKENIZER_FILES[0])["model"]["vocab"])
        for name in TOKENIZER_FILES if self.tokenizer is not None else ():
            _copy(self.tokenizer, folder, name)
        origin = self.tokenizer or self.description.origin
        known = read_json(origin / CONFIG_FILE).get("vocabulary_map") if is_chameleon(origin) else None
        if isinstance(known, dict) and IMAGE_PLACEHOLDER in known:
            return known
        return vocabulary_map(self.vocabulary, known if isinstance(known, dict) else None)

    def _write_processor(self, folder: Path) -> None:
        """That of whoever the pictures or the text come from, else ours."""
        if self.pictures is None or not self.pictures.tensors:
            return
        if not _copy(self.pictures.origin, folder, IMAGE_PROCESSOR_FILE):
            write_json(folder / IMAGE_PROCESSOR_FILE, image_processor_settings(self.pictures.image_size))
        if self.tokenizer is not None and not _copy(self.tokenizer, folder, PROCESSOR_FILE):
            image_token = _mapping(folder / TOKENIZER_CONFIG_FILE).get("image_token", IMAGE_PLACEHOLDER)
            write_json(folder / PROCESSOR_FILE, processor_settings(self.vocabulary, image_token))


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings; copy it again, or remove it")
    return values


def _copy(source: Path | None, folder: Path, name: str) -> bool:
    """Whether there is such a file, which then is copied."""
    if source is None or not (source / name).is_file():
        return False
    shutil.copyfile(source / name, folder / name)
    return True
