"""The plain form of a decoder, between all formats: each matrix by itself, whole, in a fixed order of rows.

Queries and keys stand in the order of rotated halves (Hugging Face's and ours; Meta's release pairs neighbours), as do
the vectors of QK-norm. `q` is [num_attention_heads x head_dim, hidden], `k` and `v` [num_query_groups x head_dim,
hidden], `o` [hidden, num_attention_heads x head_dim], `gate` and `up` [ffn_hidden, hidden], `down` [hidden,
ffn_hidden]; QK-norm vectors are [qk_norm_groups, head_dim]; `embedding` and `head` [vocab, hidden].
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape
from megachameleon.config import ModelConfig, RunConfig
from megachameleon.files import read_json
from megachameleon.tokens.vocabulary import Vocabulary

Digests = Mapping[str, str]
"""Hashes of a file by algorithm, such as `sha256`: whatever the format's small files tell."""
EXTRA_FILE = "megachameleon.json"
"""Beside exports: what other formats have no place for, such as vocabulary, fingerprints of tokenizers, lineage."""
SHA256 = re.compile("[0-9a-fA-F]{64}")
QK_NORMS = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
MOST_LAYERS = 1_000
"""More are taken for damage."""


def plain_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a decoder by its plain name, such as `layers.3.q_norm.weight`, in the order of computation.

    Raises:
        ValueError: more layers than any model has, of which even the names would fill the memory.
    """
    if model.num_layers > MOST_LAYERS:
        raise ValueError(
            f"num_layers: {model.num_layers:,} layers are no model's; its configuration is damaged, copy it again"
        )
    hidden, width, inner = model.hidden_size, model.head_dim, model.ffn_hidden_size
    queries, keys = model.num_attention_heads * width, model.num_query_groups * width
    norms = {"layernorm": QK_NORMS, "rmsnorm": ("q_norm.weight", "k_norm.weight"), "none": ()}[model.qk_norm]
    layer: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        **dict.fromkeys(norms, (model.qk_norm_groups, width)),
    }
    shapes: dict[str, Shape] = {"embedding": (model.vocab_size, hidden)}
    for i in range(model.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"final_norm": (hidden,), "head": (model.vocab_size, hidden)}


def layer_of(name: str) -> tuple[int | None, str]:
    """The layer of a plain tensor (None: none) and its name within it."""
    if not name.startswith("layers."):
        return None, name
    _, number, rest = name.split(".", 2)
    return int(number), rest


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint is, apart from its weights."""

    model: ModelConfig
    dtype: torch.dtype
    """Of the weights as they will be read."""
    origin: Path
    identity: str
    """A hash that changes when the checkpoint does, by which an interrupted conversion knows its source again."""
    vocabulary: dict[str, Any] | None = None
    """`Vocabulary.to_dict` form; None: the source does not say."""
    tokenizers: Mapping[str, str | None]
    """Fingerprints of the `text` and `image` tokenizers, where they are known."""
    run: RunConfig | None = None
    """The whole configuration, where the format carries one."""
    lineage: Mapping[str, Any]
    """Where it comes from, for the record."""
    is_variant: bool = False
    """Whether the format's own software cannot load it."""
    notes: tuple[str, ...] = ()
    """What a reader should be told: what was recognised, what is missing."""


@dataclass(frozen=True, kw_only=True)
class KnownHash:
    """A file of a source and what its bytes should hash to."""

    path: Path
    digest: str
    """Hexadecimal."""
    algorithm: str = "sha256"
    """As `hashlib.new` calls it."""
    said_by: str
    """The file that says so, for errors."""


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor, from several threads at once."""

    description: Description

    def hashes(self) -> list[KnownHash]:
        """Of the files with tensors, where the format has any; they are compared before a conversion is whole."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """A box of the plain tensor `name`, on the CPU, in `description.dtype`.

        Raises:
            ValueError: the file is damaged.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A box of a plain tensor."""

    name: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of an output file."""

    name: str
    """In the file."""
    shape: Shape
    dtype: torch.dtype
    cuts: tuple[Cut, ...]
    """What it is made of; nothing: the sink has it from elsewhere."""
    read_from: str = ""
    """That place and its state, so that an interrupted conversion does not mix two of them."""

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return Box((), self.shape).size * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file to be written, independent of all others: the unit of parallel work and of resuming."""

    name: str
    """Relative to the destination."""
    pieces: tuple[Piece, ...]
    """In the order in which they are written."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(piece.num_bytes for piece in self.pieces)


class Sink(Protocol):
    """A format that can be written, several files at once, each in a thread of its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out or changed, a line each."""
        ...

    def files(self) -> list[OutputFile]:
        """All files with tensors."""
        ...

    def make(self, piece: Piece, parts: Sequence[Tensor]) -> Tensor:
        """A piece from its cuts, in the piece's dtype and shape."""
        ...

    def write(self, path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
        """Write a file of this format tensor by tensor and make it durable.

        Args:
            tensors: values of the pieces, in their order, each whole or in blocks of its rows; only one is needed in
                memory at a time.

        Raises:
            OSError: it cannot be written; what there is of it is left.
        """
        ...

    def finish(self, folder: Path, digests: Mapping[str, Digests]) -> None:
        """Write the small files (configuration, index, manifest, tokenizers) beside the tensors.

        Args:
            digests: of the files with tensors, by their names.
        """
        ...


def read_extra(folder: Path) -> dict[str, Any]:
    """Our own file beside an export; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / EXTRA_FILE
    extra = read_json(path) if path.is_file() else {}
    if not isinstance(extra, dict):
        raise ValueError(f"{path}: is not a JSON object; copy it again or remove it")
    for name in ("tokenizers", "lineage", "sha256"):
        if not isinstance(extra.get(name) or {}, dict):
            raise ValueError(f"{path}: {name} is not a JSON object; copy it again or remove it")
    if not all(value is None or isinstance(value, str) for value in (extra.get("tokenizers") or {}).values()):
        raise ValueError(f"{path}: tokenizers are not fingerprints; copy it again or remove it")
    # They become names of files that tell what was compared, so nothing else may stand there.
    if not all(isinstance(d, str) and SHA256.fullmatch(d) for d in (extra.get("sha256") or {}).values()):
        raise ValueError(f"{path}: sha256 are not hashes; copy it again or remove it")
    return extra


def vocabulary_of_tokenizer(folder: Path, extra: Mapping[str, Any], tokenizer: Path) -> Vocabulary:
    """What a tokenizer says of an export's ids; of text it may have more or fewer than our own file there says.

    Raises:
        ValueError: other ids differ too, so it is another tokenizer.
    """
    theirs = Vocabulary.load(tokenizer)
    if extra.get("vocabulary"):
        mine = Vocabulary.from_dict(extra["vocabulary"], origin=str(folder / EXTRA_FILE))
        replace(mine, size=theirs.size).require_same(theirs, str(folder), str(tokenizer))
    return theirs


def stored_hashes(extra: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by the names of files, as our own file beside them tells."""
    return {name: digest.lower() for name, digest in (extra.get("sha256") or {}).items()}


def whole(name: str, shape: Shape) -> Cut:
    """All of a plain tensor."""
    return Cut(name=name, box=Box((0,) * len(shape), shape))


def require_tensors(origin: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Refuse a set of tensors that is not the one a model has.

    Raises:
        ValueError: lists all that are missing, unknown, or of another shape.
    """
    problems = []
    # All at once, since whoever mends a folder should not have to run this once a tensor.
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        problems.append(f"{len(unknown)} unknown: {', '.join(unknown)}")
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    if other:
        shapes = ", ".join(f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in other)
        problems.append(f"{len(other)} of another shape: {shapes}")
    if problems:
        raise ValueError(f"{origin}: not the tensors of the model that its configuration says; {'; '.join(problems)}")
