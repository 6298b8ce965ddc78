"""Reading Chameleon in Hugging Face's layout, and what others have made of it.

Known variants: a QK-norm vector for each head (transformers), for each group (Lumina-mGPT), or one in all with queries
and keys in Meta's order of rows (the fork of anole).
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, within
from megachameleon.checkpoint.formats.huggingface_config import read_model, read_vocabulary
from megachameleon.checkpoint.formats.huggingface_names import (
    CONFIG_FILE,
    EXTRA_FILE,
    IGNORED,
    INDEX_FILE,
    PICTURES,
    WEIGHTS_FILE,
    name_in_huggingface,
    shape_in_huggingface,
)
from megachameleon.checkpoint.formats.plain import Description, plain_shapes, require_tensors
from megachameleon.config import ModelConfig
from megachameleon.files import read_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class HuggingFaceSource:
    """Chameleon's decoder in a folder of safetensors files."""

    def __init__(
        self,
        path: Path,
        *,
        tokenizer: Path | None = None,
        qk_norm_groups: int | None = None,
        average_qk_norm: bool = False,
    ) -> None:
        """
        Args:
            path: a folder with config.json and safetensors files.
            tokenizer: a text tokenizer's folder of ours, whose vocabulary it has.
            qk_norm_groups: groups of heads with a QK-norm of their own; None: what the file says.
            average_qk_norm: where heads of a group differ, take their mean.

        Raises:
            ValueError: it is damaged, another model, has other tensors, or heads of a group differ.
        """
        self.folder = path
        settings = read_json(path / CONFIG_FILE)
        self.places, shapes, dtypes = read_headers(path)
        model = read_model(path / CONFIG_FILE, settings)
        model, self.variant = _recognised(path, model, shapes, qk_norm_groups)
        self._averaged = average_qk_norm
        self._shapes = plain_shapes(model)
        found = {name: shape for name, shape in shapes.items() if not name.startswith(PICTURES)}
        found = {name: shape for name, shape in found.items() if not name.endswith(IGNORED)}
        require_tensors(
            path, found, {name_in_huggingface(n): self._stored(model, n, s) for n, s in self._shapes.items()}
        )
        extra = read_json(path / EXTRA_FILE) if (path / EXTRA_FILE).is_file() else {}
        vocabulary = read_vocabulary(path, settings, extra, tokenizer)
        self.description = Description(
            model=model,
            dtype=_widest(path, {dtypes[name] for name in found}),
            origin=path,
            identity=_identity(path, set(self.places.values())),
            vocabulary=vocabulary,
            tokenizers=extra.get("tokenizers") or {"text": None, "image": None},
            lineage=extra.get("lineage") or {"datasets": {}, "parent": None, "starts": []},
            is_variant=self.variant != "heads",
            notes=(self._variant_note(),) if self._variant_note() else (),
        )
        distance = self._largest_distance()
        if distance:
            note = f"QK-norms of the heads of a group were averaged; they were up to {distance:.3g} apart"
            self.description = replace(self.description, notes=(*self.description.notes, note))

    def checks(self) -> list[str]:
        """None: the format has no hashes."""
        return []

    def check(self, name: str) -> None:
        """See `Source`."""

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        model, stored = self.description.model, name_in_huggingface(name)
        if "_norm." in name:
            values = self._grouped(name, self._whole(stored))
        elif self.variant == "anole" and name.endswith((".q", ".k")):
            heads = model.num_attention_heads if name.endswith(".q") else model.num_query_groups
            values = halves_together(self._whole(stored), heads)
        else:
            return self._open(stored, within(Box((0,) * len(box.shape), self._shapes[name]), box)).to(
                self.description.dtype
            )
        return values[within(Box((0,) * len(box.shape), self._shapes[name]), box)].to(self.description.dtype)

    def _stored(self, model: ModelConfig, name: str, shape: Shape) -> Shape:
        """The shape that a tensor has in this variant."""
        if "_norm." not in name or self.variant == "groups":
            return shape
        return shape[1:] if self.variant == "anole" else shape_in_huggingface(model, name, shape)

    def _variant_note(self) -> str:
        return {
            "heads": "",
            "groups": "Lumina's variant: a QK-norm for each group of heads",
            "anole": "anole's variant: queries, keys and their norms in Meta's order, put into that of Hugging Face",
        }[self.variant]

    def _grouped(self, name: str, values: Tensor) -> Tensor:
        """A QK-norm's vectors as [groups, head_dim] in our order of rows."""
        groups = self._shapes[name][0]
        if self.variant == "anole":
            return halves_together(values[:, None], 1).view(1, -1)
        by_group = values.unflatten(0, (groups, -1))
        same = bool((by_group == by_group[:, :1]).all())
        return by_group[:, 0] if same else by_group.float().mean(1).to(values.dtype)

    def _largest_distance(self) -> float:
        """Between a head's QK-norm and the first of its group.

        Raises:
            ValueError: there is one, and nobody has asked for averages.
        """
        if self.variant != "heads":
            return 0.0
        model, apart = self.description.model, {}
        for name in (name for name in self._shapes if "_norm." in name):
            by_group = self._whole(name_in_huggingface(name)).float().unflatten(0, (model.qk_norm_groups, -1))
            distance = (by_group - by_group[:, :1]).abs().max().item()
            if distance:
                apart[name] = distance
        if not apart or self._averaged:
            return max(apart.values(), default=0.0)
        worst = max(apart, key=lambda name: apart[name])
        raise ValueError(
            f"{self.folder}: heads of a group differ in {len(apart)} QK-norm tensors (by up to {apart[worst]:.3g} in "
            f"{name_in_huggingface(worst)}), and {model.qk_norm_groups} groups cannot hold them: give more groups with "
            f"--qk-norm-groups (at most {model.num_query_groups}), or --average-qk-norm, which changes the model"
        )

    def _whole(self, stored: str) -> Tensor:
        return self._open(stored, ())

    def _open(self, stored: str, part: tuple[slice, ...]) -> Tensor:
        path = self.folder / self.places[stored]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(stored)[part] if part else file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None


def halves_together(values: Tensor, heads: int) -> Tensor:
    """Rows [heads x head_dim, ...] in which rotated pairs are neighbours, reordered so that halves of a head rotate."""
    width = values.shape[0] // heads
    return values.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def read_headers(folder: Path) -> tuple[dict[str, str], dict[str, Shape], dict[str, str]]:
    """File, shape and type of every tensor in a folder of safetensors files; only headers are read.

    Raises:
        ValueError: there are none, one is missing or damaged, or the index is not theirs.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder}: neither {INDEX_FILE} nor {WEIGHTS_FILE}; give the folder of a Chameleon")
        return _headers(folder, [WEIGHTS_FILE])
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: has no 'weight_map' from tensors to files; copy it again")
    for name in set(weight_map.values()):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: names the file {name!r}, which is not beside it; copy it there")
    found = _headers(folder, sorted(set(weight_map.values())))
    wrong = sorted(name for name in {*weight_map, *found[0]} if weight_map.get(name) != found[0].get(name))
    if wrong:
        raise ValueError(f"{index}: tensors are not where it says: {', '.join(wrong)}; copy index and files again")
    return found


def _headers(folder: Path, names: list[str]) -> tuple[dict[str, str], dict[str, Shape], dict[str, str]]:
    files: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for file_name in names:
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    files[name], shapes[name], dtypes[name] = file_name, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            path = folder / file_name
            raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error}); copy it again") from None
    return files, shapes, dtypes


def _recognised(
    folder: Path, model: ModelConfig, shapes: dict[str, Shape], groups: int | None
) -> tuple[ModelConfig, str]:
    """The model with its groups of QK-norm, and which variant it is, from the first layer."""
    shape = shapes.get("model.layers.0.self_attn.q_norm.weight", ())
    if len(shape) == 1:
        stored, variant = 1, "anole"
    elif len(shape) == 2 and shape[0] != model.num_attention_heads:
        stored, variant = shape[0], "groups"
    else:
        stored, variant = model.qk_norm_groups, "heads"
    if groups is not None and variant != "heads" and groups != stored:
        raise ValueError(f"{folder}: has {stored} groups of QK-norm, not {groups}; leave --qk-norm-groups out")
    model = replace(model, qk_norm_groups=groups or stored)
    try:
        model.validate()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model, variant


def _widest(folder: Path, kinds: set[str]) -> torch.dtype:
    if unknown := sorted(kinds - DTYPES.keys()):
        raise ValueError(f"{folder}: tensors of type {', '.join(unknown)}; only floats are weights")
    found = {DTYPES[kind] for kind in kinds}
    if torch.float64 in found:
        return torch.float64
    return found.pop() if len(found) == 1 else torch.float32


def _identity(folder: Path, files: set[str]) -> str:
    """By names, sizes and times, since reading all bytes would take as long as converting them."""
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name in sorted(files):
        status: Any = (folder / name).stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
