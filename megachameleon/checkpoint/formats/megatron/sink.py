"""Our own checkpoints, written as files of the ranks of a layout."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape
from megachameleon.checkpoint.folder import (
    INDEX_FILE,
    LATEST_FILE,
    CheckpointManifest,
    checkpoint_name,
    write_manifest,
)
from megachameleon.checkpoint.formats.megatron.layout import Place, global_key, global_shapes, places
from megachameleon.checkpoint.formats.plain import (
    Cut,
    Description,
    Digests,
    OutputFile,
    Piece,
    layer_of,
    plain_shapes,
    whole,
)
from megachameleon.checkpoint.formats.rows import grown
from megachameleon.checkpoint.formats.writing import file_order, write_safetensors
from megachameleon.checkpoint.lineage import versions
from megachameleon.checkpoint.saving import small_files
from megachameleon.checkpoint.state import UPDATES
from megachameleon.checkpoint.tensors import (
    Index,
    Part,
    TensorEntry,
    index_to_json,
    merge_indexes,
)
from megachameleon.config import KernelsConfig, ParallelConfig, RunConfig, TrainingConfig
from megachameleon.config.training import OptimizerConfig
from megachameleon.files import sha256_of, write_json, write_text
from megachameleon.tokens.vocabulary import Vocabulary

PROGRESS: dict[str, Any] = {"step": 0, "consumed_samples": 0, "skipped": ()}


@dataclass(frozen=True, kw_only=True)
class GlobalPiece(Piece):
    """A box of a global tensor."""

    key: str
    global_shape: Shape
    offset: Shape


@dataclass(frozen=True)
class MegatronSink:
    """A checkpoint at step 0, weights alone: `checkpoint.init_from` starts from it, at any layout."""

    description: Description
    dtype: torch.dtype
    tensor_parallel: int = 1
    """Files of one pipeline stage; the format itself knows no layout."""
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        config = self._config()
        config.parallel.validate(config.model, config.data.sequence_length)
        if self.description.vocabulary is None:
            raise ValueError(
                f"{self.description.origin}: does not say what its ids mean; give the folder of its text tokenizer "
                "with --tokenizer (tools/import_tokenizer.py makes one)"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Sink`."""
        return ("weights only: a run that starts from it by checkpoint.init_from has a fresh optimizer",)

    def files(self) -> list[OutputFile]:
        """A file of each rank of the layout."""
        shapes = plain_shapes(self.description.model)
        shapes_in_files = global_shapes(self.description.model, shapes)
        files = []
        for stage in range(self.pipeline_parallel):
            for rank in range(self.tensor_parallel):
                pieces: list[GlobalPiece] = []
                for name, shape in shapes.items():
                    if self._stage_of(name) == stage:
                        pieces += self._pieces(name, shape, rank, shapes_in_files)
                number = stage * self.tensor_parallel + rank
                files.append(OutputFile(name=f"{checkpoint_name(0)}/{_file_name(number)}", pieces=file_order(pieces)))
        return files

    def _stage_of(self, name: str) -> int:
        """The pipeline stage that holds a plain tensor."""
        layer, _ = layer_of(name)
        if layer is None:
            return 0 if name == "embedding" else self.pipeline_parallel - 1
        # Only which file holds a layer; whoever reads goes by the index.
        return layer * self.pipeline_parallel // self.description.model.num_layers

    def _pieces(self, name: str, shape: Shape, rank: int, shapes: Mapping[str, Shape]) -> Iterator[GlobalPiece]:
        """What a tensor-parallel rank stores of a plain tensor; keys and values stand with their queries."""
        model, size = self.description.model, self.tensor_parallel
        layer, rest = layer_of(name)
        key = global_key(model, name)
        if rest == "q":
            first, count = (n * model.num_query_groups // size for n in (rank, 1))
            cuts = tuple(
                Cut(name=f"layers.{layer}.{which}", box=place.plain)
                for places_of_group in list(zip(*self._places_of(layer), strict=True))[first : first + count]
                for which, place in zip("qkv", places_of_group, strict=True)
            )
            rows = sum(cut.box.shape[0] for cut in cuts)
            yield self._piece(key, shapes[key], (layer or 0, rank * rows, 0), (1, rows, model.hidden_size), cuts)
        elif rest in ("k", "v"):
            return
        elif len(shape) == 1 or "_norm." in rest:
            if rank == 0:
                offset: Shape = (0,) if layer is None else (layer, 0)
                extent = shape if layer is None else (1, shapes[key][1])
                yield self._piece(key, shapes[key], offset, extent, (whole(name, shape),))
        else:
            axis = 1 if rest in ("o", "down") else 0
            part = tuple(n // size if i == axis else n for i, n in enumerate(shape))
            start = tuple(rank * n if i == axis else 0 for i, n in enumerate(part))
            (place,) = places(model, name, shape)
            prefix = () if layer is None else (1,)
            shift = (*(0 for _ in prefix), *start)
            offset = tuple(a + b for a, b in zip(place.offset, shift, strict=True))
            yield self._piece(key, shapes[key], offset, prefix + part, (Cut(name=name, box=Box(start, part)),))

    def _places_of(self, layer: int | None) -> list[list[Place]]:
        """Places of queries, keys and values by query group."""
        model = self.description.model
        shapes = plain_shapes(model)
        return [list(places(model, f"layers.{layer}.{which}", shapes[f"layers.{layer}.{which}"])) for which in "qkv"]

    def _piece(self, key: str, full: Shape, offset: Shape, shape: Shape, cuts: tuple[Cut, ...]) -> GlobalPiece:
        name = f"{key}@{','.join(map(str, offset))}"  # as `StoredTensor.name`
        return GlobalPiece(
            name=name, shape=shape, dtype=self.dtype, cuts=cuts, key=key, global_shape=full, offset=offset
        )

    def make(self, piece: Piece, parts: Sequence[Tensor]) -> Tensor:
        """Parts below each other; one part alone is not copied."""
        values = [part.to(piece.dtype) for part in parts]
        return (values[0] if len(values) == 1 else torch.cat(values)).reshape(piece.shape)

    def write(self, path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
        """See `Sink`."""
        return write_safetensors(path, pieces, tensors)

    def finish(self, folder: Path, digests: Mapping[str, Digests]) -> None:
        """Index, configuration, progress, manifest, and the name of the newest checkpoint."""
        checkpoint = folder / checkpoint_name(0)
        index = merge_indexes(_index_of(file) for file in self.files())
        write_json(checkpoint / INDEX_FILE, index_to_json(index))
        texts = small_files(self._config(), PROGRESS, {UPDATES: 0})
        for name, text in texts.items():
            write_text(checkpoint / name, text)
        hashes = {Path(name).name: found["sha256"] for name, found in digests.items()}
        hashes |= {name: sha256_of(checkpoint / name) for name in (INDEX_FILE, *texts)}
        files = {name: {"size": (checkpoint / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)}
        assert self.description.vocabulary is not None
        known = Vocabulary.from_dict(self.description.vocabulary, origin=str(self.description.origin))
        vocabulary = grown(known, self.description.model.vocab_size)  # here every row is an id
        fitting = self.description.tokenizers.get("text") if vocabulary == known else None
        manifest = CheckpointManifest(
            step=0,
            consumed_samples=0,
            data_fingerprint="",
            versions=versions(),
            vocabulary=asdict(vocabulary),
            tokenizers={**self.description.tokenizers, "text": fitting},
            files=files,
            lineage=dict(self.description.lineage),
        )
        write_manifest(checkpoint, manifest)
        write_text(folder / LATEST_FILE, checkpoint.name + "\n")

    def _config(self) -> RunConfig:
        """That of the source, or all defaults with this model."""
        layout = ParallelConfig(tensor_parallel=self.tensor_parallel, pipeline_parallel=self.pipeline_parallel)
        precision: Any = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        run = self.description.run
        if run is None:
            model = self.description.model
            run = RunConfig(
                model=model,
                training=TrainingConfig(num_steps=1, global_batch_size=1),
                optimizer=OptimizerConfig(warmup_steps=0),
            )
            # The defaults may be longer than the model has learnt to see.
            length = min(run.data.sequence_length, model.context_length)
            run = replace(run, data=replace(run.data, sequence_length=length))
        training = replace(run.training, precision=precision)
        # The run that this was converted from began elsewhere; one that starts here must not go there.
        start = replace(run.checkpoint, init_from=None)
        return replace(run, parallel=layout, training=training, checkpoint=start, kernels=KernelsConfig())


def _index_of(file: OutputFile) -> Index:
    index: Index = {}
    for piece in file.pieces:
        assert isinstance(piece, GlobalPiece)
        part = Part(file=Path(file.name).name, name=piece.name, box=Box(piece.offset, piece.shape))
        known = index[piece.key].parts if piece.key in index else ()
        dtype = str(piece.dtype).removeprefix("torch.")
        index[piece.key] = TensorEntry(shape=piece.global_shape, dtype=dtype, parts=(*known, part))
    return index


def _file_name(number: int) -> str:
    return f"tensors_{number:05d}.safetensors"
