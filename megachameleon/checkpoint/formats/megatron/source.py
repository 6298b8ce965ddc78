"""Our own checkpoints, read whatever layout wrote them."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, overlap, within
from megachameleon.checkpoint.folder import (
    INDEX_FILE,
    MANIFEST_FILE,
    DamagedCheckpointError,
    read_manifest,
    resolve_checkpoint,
    verify_hashes,
)
from megachameleon.checkpoint.formats.dtypes import widest
from megachameleon.checkpoint.formats.megatron.layout import Place, global_key, global_shapes, places
from megachameleon.checkpoint.formats.plain import (
    Description,
    KnownHash,
    layer_of,
    plain_shapes,
    require_tensors,
)
from megachameleon.checkpoint.lineage import Ancestor
from megachameleon.checkpoint.loading import saved_config
from megachameleon.checkpoint.tensors import (
    Index,
    StoredTensor,
    TensorEntry,
    index_from_json,
    read_tensors,
)
from megachameleon.config import RunConfig
from megachameleon.files import read_json, sha256_of

OPTIMIZER, MASTER = "optimizer.", "optimizer.master."


class MegatronSource:
    """Weights of a checkpoint; boxes of its files are read straight into plain tensors."""

    def __init__(self, path: Path, *, exact: bool = False) -> None:
        """
        Args:
            path: a checkpoint, a run's `checkpoints` folder, or a run's folder (its newest checkpoint).
            exact: the fp32 masters of a bf16 run instead of its weights, where there are any.

        Raises:
            ValueError: no complete checkpoint, a damaged one, or other tensors than its model has.
        """
        self.checkpoint = resolve_checkpoint(path)
        self._manifest = read_manifest(self.checkpoint)
        small = [name for name in self._manifest.files if not name.endswith(".safetensors")]
        verify_hashes(self.checkpoint, small, self._manifest)
        run = saved_config(self.checkpoint)
        self._shapes = plain_shapes(run.model)
        self._index, self._masters = self._weights(run, exact)
        self._by_layer: dict[int, Index] = {}
        self.description = Description(
            model=run.model,
            dtype=widest(self.checkpoint, {str(entry.dtype) for entry in self._index.values()}),
            origin=self.checkpoint,
            identity=sha256_of(self.checkpoint / MANIFEST_FILE),
            vocabulary=self._manifest.vocabulary,
            tokenizers=self._manifest.tokenizers,
            run=run,
            lineage={**self._manifest.lineage, "parent": asdict(Ancestor.of(self.checkpoint))},
            notes=("read the fp32 masters, which are more exact than the bf16 weights",) if self._masters else (),
        )

    def _weights(self, run: RunConfig, exact: bool) -> tuple[Index, bool]:
        """The index of the weights, or of their masters under the same names."""
        path = self.checkpoint / INDEX_FILE
        index = index_from_json(read_json(path), origin=str(path))
        weights = {key: entry for key, entry in index.items() if not key.startswith(OPTIMIZER)}
        found = {key: entry.shape for key, entry in weights.items()}
        require_tensors(self.checkpoint, found, global_shapes(run.model, self._shapes))
        masters = {key.removeprefix(MASTER): entry for key, entry in index.items() if key.startswith(MASTER)}
        # Masters of some weights only would mix two states of the run.
        has_masters = exact and masters.keys() == weights.keys()
        return (masters if has_masters else weights), has_masters

    def hashes(self) -> list[KnownHash]:
        """Of all files with weights."""
        names = sorted({part.file for entry in self._index.values() for part in entry.parts})
        known = self._manifest.files
        if unlisted := [name for name in names if name not in known]:
            raise DamagedCheckpointError(
                f"{self.checkpoint / INDEX_FILE}: names {', '.join(unlisted)}, of which the manifest knows nothing; "
                "the checkpoint is damaged: copy it again"
            )
        return [
            KnownHash(path=self.checkpoint / name, digest=known[name]["sha256"], said_by=MANIFEST_FILE)
            for name in names
        ]

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        model, dtype = self.description.model, self.description.dtype
        key = global_key(model, name)
        entry = self._entry(key, layer_of(name)[0])
        stored = (MASTER if self._masters else "") + key
        values = torch.empty(box.shape, dtype=dtype)
        wanted = [
            StoredTensor(key=stored, global_shape=entry.shape, offset=offset, data=data)
            for offset, data in targets(places(model, name, self._shapes[name]), box, values, len(entry.shape))
        ]
        read_tensors(self.checkpoint, {stored: entry}, wanted)
        return values

    def _entry(self, key: str, layer: int | None) -> TensorEntry:
        """The parts that hold a layer; a large run's stacked tensors have thousands."""
        entry = self._index[key]
        if layer is None:
            return entry
        # Threads may both make an entry, and then make the same one.
        here = self._by_layer.setdefault(layer, {})
        if key not in here:
            parts = (part for part in entry.parts if 0 <= layer - part.box.offset[0] < part.box.shape[0])
            here[key] = replace(entry, parts=tuple(parts))
        return here[key]


def targets(all_places: Iterator[Place], box: Box, values: Tensor, axes: int) -> Iterator[tuple[Shape, Tensor]]:
    """Which stretches of `values`, a box of a plain tensor, are filled from where in the global tensor."""
    for place in all_places:
        shared = overlap(place.plain, box)
        if shared is None:
            continue
        data = values[within(box, shared)]
        shift = tuple(a - b for a, b in zip(shared.offset, place.plain.offset, strict=True))
        more = axes - len(shift)
        offset = tuple(a + b for a, b in zip(place.offset, (0,) * more + shift, strict=True))
        yield offset, data[(None,) * more] if more else data
