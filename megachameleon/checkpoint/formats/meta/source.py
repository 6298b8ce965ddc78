"""Reading Meta's release format, in any number of files."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, overlap, within
from megachameleon.checkpoint.formats.dtypes import widest
from megachameleon.checkpoint.formats.grouping import largest_distance, regrouped
from megachameleon.checkpoint.formats.meta.names import (
    AXES,
    CHECKLIST_FILE,
    CONSOLIDATE_FILE,
    PARAMS_FILE,
    ROPE,
    SINGLE_FILE,
    halves_together,
    is_qk_norm,
    name_in_meta,
    part_of_shard,
    require_shards,
    shape_in_meta,
)
from megachameleon.checkpoint.formats.meta.params import MOST_JSON_BYTES, model_of_params, read_params
from megachameleon.checkpoint.formats.plain import (
    EXTRA_FILE,
    Description,
    KnownHash,
    layer_of,
    plain_shapes,
    read_extra,
    require_tensors,
    vocabulary_of_tokenizer,
)
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.torch_files import TorchTensor, read_part, read_torch_index

INSIDE = ("models/*", "data/models/*", "*")
"""Where a downloaded release has its models, below the folder that is named."""


class MetaSource:
    """Chameleon's decoder in files of `torch.save`; only their small indexes are held."""

    def __init__(self, path: Path, *, tokenizer: Path | None = None) -> None:
        """
        Args:
            path: a folder with params.json and consolidated*.pth, or one in which there is exactly one such folder.
            tokenizer: a text tokenizer's folder of ours, whose vocabulary the model has.

        Raises:
            ValueError: it is damaged or another model, has other tensors, or replicated tensors differ.
        """
        self.folder = folder = _folder_of_model(path)
        params = read_params(folder)
        self.files, notes = _files(folder)
        shards = len(self.files)
        self._checklist = _read_checklist(folder)
        self._shards = [_tensors(folder / name) for name in self.files]
        extra = read_extra(folder)
        found = {name: tensor.shape for name, tensor in self._shards[0].items()}
        model = model_of_params(folder, params, found, shards, extra)
        require_shards(model, shards, str(folder))
        self._shapes = plain_shapes(model)
        self._require_tensors()
        self._require_replicas()
        if params["swin_norm"] is None:
            notes += (f"the settings do not say swin_norm; taken to be false, as by Meta's loader ({folder})",)
        groups = self._fewer_groups(extra)
        if groups:
            model = replace(model, qk_norm_groups=groups)
            self._shapes = plain_shapes(model)
        self.description = Description(
            model=model,
            dtype=widest(folder, self._dtypes()),
            origin=folder,
            identity=self._identity(),
            vocabulary=_vocabulary(folder, model.vocab_size, extra, tokenizer),
            tokenizers=extra.get("tokenizers") or {"text": None, "image": None},
            lineage=extra.get("lineage") or {"datasets": {}, "parent": None, "starts": []},
            notes=notes,
        )

    def hashes(self) -> list[KnownHash]:
        """Of the files that are read: those that `checklist.chk` knows."""
        return [
            KnownHash(path=self.folder / name, digest=digest, algorithm="md5", said_by=CHECKLIST_FILE)
            for name in (*self.files, PARAMS_FILE, CONSOLIDATE_FILE)
            if (digest := self._checklist.get(name))
        ]

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        if is_qk_norm(name):
            shape = self._shapes[name]
            values = regrouped(self._qk_norm(name), shape[0]).to(self.description.dtype)
            return values[within(Box((0,) * len(shape), shape), box)]
        _, rest = layer_of(name)
        if rest not in ("q", "k"):
            return self._read_stored(name, box)
        # Pairs of rows are put apart within a head, so whole heads are read.
        width = self.description.model.head_dim
        first, last = box.offset[0] // width * width, -(-(box.offset[0] + box.shape[0]) // width) * width
        heads = Box((first, *box.offset[1:]), (last - first, *box.shape[1:]))
        return halves_together(self._read_stored(name, heads), width)[within(heads, box)]

    def _read_stored(self, name: str, box: Box) -> Tensor:
        """A box of a tensor that is divided among the files, or in all of them, in Meta's order of rows."""
        stored, shape = name_in_meta(name), self._shapes[name]
        values = torch.empty(box.shape, dtype=self.description.dtype)
        shards = range(len(self.files) if layer_of(name)[1] in AXES else 1)
        for shard in shards:
            part = part_of_shard(name, shape, shard, len(self.files))
            shared = overlap(part, box)
            if shared is not None:
                tensor = self._shards[shard][stored]
                read_part(self.folder / self.files[shard], tensor, within(part, shared), values[within(box, shared)])
        return values

    def _qk_norm(self, name: str) -> Tensor:
        """The vectors of all files in our order, [files, head_dim]."""
        vectors = [self._whole(shard, name_in_meta(name)) for shard in range(len(self.files))]
        dtype = max((vector.dtype for vector in vectors), key=lambda dtype: dtype.itemsize)
        return torch.stack([halves_together(vector.to(dtype), len(vector)) for vector in vectors])

    def _whole(self, shard: int, stored: str) -> Tensor:
        tensor = self._shards[shard][stored]
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        read_part(self.folder / self.files[shard], tensor, tuple(slice(0, n) for n in tensor.shape), values)
        return values

    def _require_tensors(self) -> None:
        wanted = {name_in_meta(n): shape_in_meta(n, s, len(self.files)) for n, s in self._shapes.items()}
        problems = []
        for name, tensors in zip(self.files, self._shards, strict=True):
            try:
                require_tensors(self.folder / name, {n: tensor.shape for n, tensor in tensors.items()}, wanted)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    def _require_replicas(self) -> None:
        """Refuse norms of which the files hold different values: a mean, which some take, would be another model."""
        replicated = [n for n in self._shapes if layer_of(n)[1] not in AXES and not is_qk_norm(n)]
        wrong = []
        for name in map(name_in_meta, replicated):
            first = self._whole(0, name)
            if any(not torch.equal(self._whole(shard, name), first) for shard in range(1, len(self.files))):
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"{self.folder}: the files differ in {', '.join(wrong)}, of which each should hold the same; they are "
                "not of one model, so copy all again"
            )

    def _fewer_groups(self, extra: Mapping[str, Any]) -> int | None:
        """As many groups of QK-norm as our own export began with, if repeated vectors are all that the files add."""
        own = extra.get("model")
        groups = own.get("qk_norm_groups") if isinstance(own, dict) else None
        if type(groups) is not int or groups < 1 or len(self.files) % groups or groups == len(self.files):
            return None
        if any(largest_distance(self._qk_norm(name), groups) for name in self._shapes if is_qk_norm(name)):
            return None
        return groups

    def _dtypes(self) -> set[str]:
        used = {tensors[name_in_meta(n)].dtype for tensors in self._shards for n in self._shapes}
        return {str(dtype).removeprefix("torch.") for dtype in used}

    def _identity(self) -> str:
        """By names, sizes and times, since reading all bytes would take as long as converting them."""
        digest = hashlib.sha256()
        for name in (PARAMS_FILE, CONSOLIDATE_FILE, EXTRA_FILE):
            digest.update((self.folder / name).read_bytes() if (self.folder / name).is_file() else b"")
        for name in self.files:
            status = (self.folder / name).stat()
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _has_model(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("consolidated*.pth"))


def _folder_of_model(path: Path) -> Path:
    """`path`, or the one folder in it that holds a model."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the one with {PARAMS_FILE} and {SINGLE_FILE}")
    if _has_model(path):
        return path
    inside = sorted({folder for pattern in INSIDE for folder in path.glob(pattern) if _has_model(folder)})
    if len(inside) != 1:
        found = f"several models: {', '.join(map(str, inside))}; name one" if inside else "no consolidated*.pth there"
        raise ValueError(f"{path}: {found}")
    return inside[0]


def _files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The files of weights in their order, and what a reader should be told of the choice."""
    numbered = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    # Numbered files may lie beside it; Meta's loader does not look at them either.
    if (folder / SINGLE_FILE).is_file():
        note = f"{SINGLE_FILE} is read and {', '.join(numbered)} are not, as by Meta's loader"
        return [SINGLE_FILE], (note,) if numbered else ()
    wanted = [f"consolidated.{shard:02}.pth" for shard in range(len(numbered))]
    if numbered != wanted:
        raise ValueError(f"{folder}: has {', '.join(numbered)}, not {wanted[0]} to {wanted[-1]}; copy all files")
    return wanted, ()


def _tensors(path: Path) -> dict[str, TorchTensor]:
    """What a file holds, without the one buffer that is computed anyway."""
    found = read_torch_index(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not named tensors; give Meta's own file")
    tensors = {str(name): value for name, value in found.items() if name != ROPE}
    others = [name for name, value in tensors.items() if not isinstance(value, TorchTensor)]
    if others:
        raise ValueError(f"{path}: {', '.join(others)[:200]}: not tensors; give Meta's own file, or save its tensors")
    return tensors


def _read_checklist(folder: Path) -> dict[str, str]:
    """MD5 by name of a file beside it."""
    path = folder / CHECKLIST_FILE
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, a release's has 200; copy it again")
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*")
        if not line.strip():
            continue
        if Path(name).name != name or len(digest) != 32 or set(digest.lower()) - set("0123456789abcdef"):
            raise ValueError(f"{path}: {line[:80]!r} is not an MD5 and the name of a file beside it; copy it again")
        read = name.startswith("consolidated") or name in (PARAMS_FILE, CONSOLIDATE_FILE)
        if read and not (folder / name).is_file():
            raise ValueError(f"{path}: names {name!r}, which is not beside it; copy it there")
        found[name] = digest.lower()
    return found


def _vocabulary(folder: Path, size: int, extra: Mapping[str, Any], tokenizer: Path | None) -> dict[str, Any] | None:
    """What the ids mean: as the tokenizer, our own export, or the release has it; None: nothing says it."""
    if tokenizer is not None:
        return asdict(vocabulary_of_tokenizer(folder, extra, tokenizer))
    if extra.get("vocabulary"):
        return asdict(Vocabulary.from_dict(extra["vocabulary"], origin=str(folder / EXTRA_FILE)))
    return asdict(Vocabulary()) if size == Vocabulary().size else None
