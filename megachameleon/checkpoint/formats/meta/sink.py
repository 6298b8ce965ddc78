"""Writing Meta's release format, in any number of files that divides the model."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape
from megachameleon.checkpoint.formats.grouping import averaging_note, largest_distance, regrouped
from megachameleon.checkpoint.formats.meta.names import (
    CHECKLIST_FILE,
    CONSOLIDATE_FILE,
    PARAMS_FILE,
    QK_NORM_EPS,
    ROPE,
    file_names,
    is_qk_norm,
    name_in_meta,
    pairs_together,
    part_of_shard,
    require_shards,
    rope_frequencies,
    shape_in_meta,
)
from megachameleon.checkpoint.formats.meta.params import own_settings, written_consolidate_params, written_params
from megachameleon.checkpoint.formats.plain import (
    EXTRA_FILE,
    Cut,
    Description,
    Digests,
    OutputFile,
    Piece,
    Source,
    layer_of,
    plain_shapes,
    whole,
)
from megachameleon.checkpoint.formats.torch_writing import write_torch_file
from megachameleon.files import write_json, write_text


class MetaSink:
    """Files of torch with settings and checksums, as Meta's loader wants them."""

    def __init__(
        self,
        description: Description,
        dtype: torch.dtype,
        shards: int | None = None,
        *,
        average_qk_norm: bool = False,
        source: Source | None = None,
    ) -> None:
        """
        Args:
            dtype: bf16 or fp32, of the weights; `rope.freqs` is fp32 always.
            shards: files; None: one for each group of QK-norm.
            average_qk_norm: where heads that would share a QK-norm differ, take their mean.
            source: its QK-norms are compared at once, and not only when they are written.

        Raises:
            ValueError: Meta's format cannot hold this model, or not in so many files.
        """
        model, origin = description.model, description.origin
        if model.qk_norm == "rmsnorm":
            raise ValueError(f"{origin}: model.qk_norm=rmsnorm, and Meta's Chameleon has layernorm or none only")
        if model.qk_norm == "layernorm" and model.norm_eps != QK_NORM_EPS:
            raise ValueError(
                f"{origin}: model.norm_eps={model.norm_eps}, while Meta's QK-norm has {QK_NORM_EPS}; exported logits "
                "would be others"
            )
        self.description, self.dtype, self.shards = description, dtype, shards or model.qk_norm_groups
        require_shards(model, self.shards, f"--shards {self.shards}")
        self._shapes = plain_shapes(model)
        self.notes: tuple[str, ...] = ("Meta's tokenizer files (text_tokenizer.json, vqgan.ckpt) are not written",)
        groups = model.qk_norm_groups
        if max(groups, self.shards) % min(groups, self.shards):
            raise ValueError(
                f"--shards {self.shards}: the model has {groups} groups of QK-norm; give a multiple of it, or a divisor"
            )
        self._average = average_qk_norm
        if source is not None and self.shards < groups:
            self.notes += self._compared(source)

    def _compared(self, source: Source) -> tuple[str, ...]:
        """What is lost of vectors that become one."""
        distances = {
            name: largest_distance(source.read(name, whole(name, shape).box), self.shards)
            for name, shape in self._shapes.items()
            if is_qk_norm(name)
        }
        groups = self.description.model.qk_norm_groups
        note = averaging_note(
            self.description.origin,
            distances,
            averaged=self._average,
            remedy=f"give --shards {groups}, or a multiple of it",
        )
        return (note,) if note else ()

    def files(self) -> list[OutputFile]:
        """See `Sink`."""
        return [
            OutputFile(name=name, pieces=tuple(self._pieces(shard)))
            for shard, name in enumerate(file_names(self.shards))
        ]

    def _pieces(self, shard: int) -> Iterator[Piece]:
        for name, shape in self._shapes.items():
            box = self._part(name, shape, shard)
            stored = shape_in_meta(name, shape, self.shards)
            yield Piece(name=name_in_meta(name), shape=stored, dtype=self.dtype, cuts=(Cut(name=name, box=box),))
        width = self.description.model.head_dim
        yield Piece(name=ROPE, shape=(width // 2,), dtype=torch.float32, cuts=())

    def _part(self, name: str, shape: Shape, shard: int) -> Box:
        """What a file is made of; of a QK-norm, the vectors of its heads' groups."""
        if not is_qk_norm(name):
            return part_of_shard(name, shape, shard, self.shards)
        # Fewer groups than files: several files repeat one vector.
        groups, width = shape
        return Box((shard * groups // self.shards, 0), (max(groups // self.shards, 1), width))

    def make(self, piece: Piece, parts: Sequence[Tensor]) -> Tensor:
        """See `Sink`: queries, keys and their norms are put into Meta's order of rows."""
        if piece.name == ROPE:
            return rope_frequencies(self.description.model)
        (values,) = parts
        name, width = piece.cuts[0].name, self.description.model.head_dim
        if is_qk_norm(name):
            if not self._average and largest_distance(values, 1):
                raise ValueError(f"{self.description.origin}: heads of a group differ in {name}; give more --shards")
            values = pairs_together(regrouped(values, 1)[0], width)
        elif layer_of(name)[1] in ("q", "k"):
            values = pairs_together(values, width)
        return values.to(piece.dtype)

    def write(self, path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
        """See `Sink`."""
        return write_torch_file(path, pieces, tensors)

    def finish(self, folder: Path, digests: Mapping[str, Digests]) -> None:
        """Settings, checksums, and what Meta's files have no place for."""
        description = self.description
        write_json(folder / PARAMS_FILE, written_params(description.model))
        write_json(folder / CONSOLIDATE_FILE, written_consolidate_params(self.dtype, self.shards))
        hashes = {
            name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in (PARAMS_FILE, CONSOLIDATE_FILE)
        }
        hashes |= {name: found["md5"] for name, found in digests.items()}
        write_text(folder / CHECKLIST_FILE, "".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
        extra = {
            "vocabulary": description.vocabulary,
            "tokenizers": dict(description.tokenizers),
            "lineage": dict(description.lineage),
            "model": own_settings(description.model),
        }
        write_json(folder / EXTRA_FILE, extra)
