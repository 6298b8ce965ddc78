"""Reading Chameleon in Hugging Face's layout, and what others have made of it.

Known variants: a QK-norm vector for each head (transformers), for each group (Lumina-mGPT), or one in all with queries
and keys in Meta's order of rows (the fork of anole).
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, within
from megachameleon.checkpoint.formats.grouping import averaging_note, largest_distance, regrouped
from megachameleon.checkpoint.formats.huggingface.config import read_model, read_vocabulary
from megachameleon.checkpoint.formats.huggingface.files import folder_identity, open_tensor, read_headers, widest_dtype
from megachameleon.checkpoint.formats.huggingface.names import (
    CONFIG_FILE,
    IGNORED,
    PICTURES,
    name_in_huggingface,
    shape_in_huggingface,
)
from megachameleon.checkpoint.formats.meta.names import halves_together
from megachameleon.checkpoint.formats.plain import (
    EXTRA_FILE,
    Description,
    KnownHash,
    plain_shapes,
    read_extra,
    require_tensors,
    stored_hashes,
)
from megachameleon.config import ModelConfig
from megachameleon.files import read_json


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
        self._shapes = plain_shapes(model)
        found = {name: shape for name, shape in shapes.items() if not name.startswith(PICTURES)}
        found = {name: shape for name, shape in found.items() if not name.endswith(IGNORED)}
        require_tensors(
            path, found, {name_in_huggingface(n): self._stored(model, n, s) for n, s in self._shapes.items()}
        )
        extra = read_extra(path)
        self._sha256 = stored_hashes(extra)
        vocabulary = read_vocabulary(path, settings, extra, tokenizer)
        self.description = Description(
            model=model,
            dtype=widest_dtype(path, {dtypes[name] for name in found}),
            origin=path,
            identity=folder_identity(path, set(self.places.values())),
            vocabulary=vocabulary,
            tokenizers=extra.get("tokenizers") or {"text": None, "image": None},
            lineage=extra.get("lineage") or {"datasets": {}, "parent": None, "starts": []},
            is_variant=self.variant != "heads",
            notes=(self._variant_note(),) if self._variant_note() else (),
        )
        self.description = replace(self.description, notes=(*self.description.notes, *self._averages(average_qk_norm)))

    def hashes(self) -> list[KnownHash]:
        """Of the files that are read: those that our own file beside them knows; the format itself has no hashes."""
        return [
            KnownHash(path=self.folder / name, digest=digest, said_by=EXTRA_FILE)
            for name in sorted(set(self.places.values()))
            if (digest := self._sha256.get(name))
        ]

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        model, stored = self.description.model, name_in_huggingface(name)
        if "_norm." in name:
            values = self._grouped(name, self._whole(stored))
        elif self.variant == "anole" and name.endswith((".q", ".k")):
            values = halves_together(self._whole(stored), model.head_dim)
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
        if self.variant == "anole":
            return halves_together(values, len(values)).view(1, -1)
        return regrouped(values, self._shapes[name][0])

    def _averages(self, averaged: bool) -> tuple[str, ...]:
        """What is lost of norms that a head has by itself.

        Raises:
            ValueError: heads of a group differ, and nobody has asked for averages.
        """
        if self.variant != "heads":
            return ()
        model = self.description.model
        distances = {
            name: largest_distance(self._whole(name_in_huggingface(name)), model.qk_norm_groups)
            for name in self._shapes
            if "_norm." in name
        }
        remedy = (
            f"{model.qk_norm_groups} groups cannot hold them; give more with --qk-norm-groups (at most "
            f"{model.num_query_groups})"
        )
        note = averaging_note(self.folder, distances, averaged=averaged, remedy=remedy)
        return (note,) if note else ()

    def _whole(self, stored: str) -> Tensor:
        return self._open(stored, ())

    def _open(self, stored: str, part: tuple[slice, ...]) -> Tensor:
        return open_tensor(self.folder / self.places[stored], stored, part)


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
        plain_shapes(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model, variant
