"""Shards: documents of token ids on disk, and datasets made of shards.

A shard is `PREFIX.bin` (ids) and `PREFIX.idx`, byte for byte what megatron-core's IndexedDatasetBuilder writes for one
sequence a document, `PREFIX.spans` (where pictures lie) and `PREFIX.json`, the manifest, which is written last: what
has no matching manifest does not exist. The formats are in `shard_format`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.data.plan import PLAN_FILE, planned_units
from megachameleon.data.shards.document_checks import find_pictures, require_ids
from megachameleon.data.shards.format import parse_idx, parse_spans
from megachameleon.data.shards.manifest import DATA_SUFFIXES, ShardManifest, is_shard_manifest
from megachameleon.files import read_json, sha256_of

VERIFY_BLOCK = 1 << 22
"""Ids that `verify` looks at together."""


def shard_file(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`; unlike Path.with_suffix, dots in the prefix stay."""
    return prefix.with_name(prefix.name + suffix)


class ShardReader:
    """One shard, memory-mapped and checked when it is opened.

    Opening compares `.idx`, `.spans` and the manifest with their hashes, and `.bin` with its size; `verify` compares
    the hash of `.bin` too, for which it must read it.
    """

    def __init__(self, prefix: Path) -> None:
        """Open `prefix.bin`, `.idx`, `.spans` and `.json`.

        Raises:
            ValueError: no manifest, a missing file, or files that contradict the manifest or each other.
        """
        self.prefix = prefix
        manifest_path = shard_file(prefix, ".json")
        if not manifest_path.exists():
            raise ValueError(
                f"{manifest_path}: no manifest, so the shard was never finished; run preprocess_data.py again"
            )
        self.manifest = ShardManifest.load(manifest_path)
        self.vocabulary = self.manifest.vocabulary
        dtype = np.dtype(self.vocabulary.token_dtype).newbyteorder("<")
        if self.manifest.dtype != dtype.name:
            raise ValueError(f"{manifest_path}: dtype {self.manifest.dtype}, but the vocabulary needs {dtype.name}")
        for suffix in DATA_SUFFIXES:
            self._check_size(suffix)
        # parsed from the very bytes that were hashed, so no change can slip in between
        self.lengths = parse_idx(self._read_unchanged(".idx"), shard_file(prefix, ".idx"), dtype)
        spans = self._read_unchanged(".spans")
        self._first, self._spans = parse_spans(
            spans, shard_file(prefix, ".spans"), self.lengths, self.vocabulary.image_length
        )
        self._check_counts(dtype)
        self._ends = np.cumsum(self.lengths)
        empty = self.manifest.num_tokens == 0  # an empty file cannot be mapped
        self._ids = np.empty(0, dtype) if empty else np.memmap(shard_file(prefix, ".bin"), dtype, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_images(self) -> np.ndarray:
        """Pictures by document, int64 [num_documents]."""
        return np.diff(self._first)

    @property
    def all_image_spans(self) -> np.ndarray:
        """Pictures of all documents, one after the other: int32 [m, 2], as `image_spans`."""
        return self._spans

    @property
    def ids(self) -> np.ndarray:
        """All ids, a plain array over the mapped file: slicing np.memmap itself costs ten times as much."""
        return self._ids.view(np.ndarray)

    def document(self, index: int) -> np.ndarray:
        """The ids of a document [length]: a read-only view of the file in its dtype (uint16 or int32)."""
        end = self._ends[index]
        return self._ids[end - self.lengths[index] : end]

    def image_spans(self, index: int) -> np.ndarray:
        """Pictures of a document: int32 [n, 2] of (start, length), begin and end ids included."""
        return self._spans[self._first[index] : self._first[index + 1]]

    def verify(self) -> None:
        """Read everything and compare it with the manifest's hashes and with itself.

        Raises:
            ValueError: a file was changed, or its ids are not whole documents of this vocabulary.
        """
        remedy = f"remove {shard_file(self.prefix, '.json')} and preprocess again (preprocess_data.py run)"
        for suffix in DATA_SUFFIXES:
            path, record = shard_file(self.prefix, suffix), self.manifest.files[suffix]
            if sha256_of(path) != record.sha256:
                raise ValueError(f"{path}: its SHA-256 is not the manifest's, so the file was changed; {remedy}")
        # hashes can be made to fit by a program that is wrong, so contents are looked at as well
        for begin, end in self._blocks(VERIFY_BLOCK):
            ids = self._ids[self._ends[begin] - self.lengths[begin] : self._ends[end - 1]]
            try:
                require_ids(ids, self.lengths[begin:end], self.vocabulary, first=begin)
                counts, spans = find_pictures(ids, self.lengths[begin:end], self.vocabulary, first=begin)
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {error}; {remedy}") from None
            stored = self._spans[self._first[begin] : self._first[end]]
            if not (np.array_equal(counts, self.num_images[begin:end]) and np.array_equal(spans, stored)):
                where = f"documents {begin}..{end - 1}"
                raise ValueError(f"{self.prefix}: spans of {where} do not match their ids; {remedy}")

    def _blocks(self, num_ids: int) -> Iterator[tuple[int, int]]:
        """Ranges of documents, each of about `num_ids` ids or of one document."""
        begin = 0
        while begin < len(self):
            target = self._ends[begin] - self.lengths[begin] + num_ids
            end = max(begin + 1, int(np.searchsorted(self._ends, target, side="right")))
            yield begin, end
            begin = end

    def _check_size(self, suffix: str) -> None:
        path, expected = shard_file(self.prefix, suffix), self.manifest.files[suffix].bytes
        actual = path.stat().st_size if path.exists() else None
        if actual != expected:
            found = "missing" if actual is None else f"{actual:,} bytes"
            raise ValueError(f"{path}: {found}, but the manifest says {expected:,} bytes; preprocess the data again")

    def _read_unchanged(self, suffix: str) -> bytes:
        path = shard_file(self.prefix, suffix)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest.files[suffix].sha256:
            raise ValueError(f"{path}: its SHA-256 is not the manifest's, so it was changed; preprocess the data again")
        return content

    def _check_counts(self, dtype: np.dtype) -> None:
        manifest = self.manifest
        actual = (
            len(self.lengths),
            int(self.lengths.sum()),
            len(self._spans),
            int(self._spans[:, 1].sum(dtype=np.int64)),
        )
        expected = (manifest.num_documents, manifest.num_tokens, manifest.num_images, manifest.num_image_tokens)
        if actual != expected or manifest.num_tokens * dtype.itemsize != manifest.files[".bin"].bytes:
            raise ValueError(
                f"{shard_file(self.prefix, '.json')}: the manifest counts {expected} documents, tokens, pictures and "
                f"picture tokens, the files hold {actual}; preprocess the data again"
            )


class Dataset:
    """Several shards as one list of documents."""

    def __init__(self, shards: Sequence[ShardReader]) -> None:
        """Put opened shards one after the other.

        Raises:
            ValueError: no shard, no document, or shards of different vocabularies or tokenizers.
        """
        if not shards:
            raise ValueError("dataset: no shards; give a folder or a list of shards")
        self.shards = tuple(shards)
        self.vocabulary = shards[0].vocabulary
        for shard in shards[1:]:
            self.vocabulary.require_same(shard.vocabulary, str(shards[0].prefix), str(shard.prefix))
        self._require_same_tokenizers()
        self.lengths = np.concatenate([shard.lengths for shard in shards])
        self.num_images = np.concatenate([shard.num_images for shard in shards])
        self._shard_ends = np.cumsum([len(shard) for shard in shards])
        if not len(self.lengths):
            raise ValueError(f"{shards[0].prefix.parent}: the shards hold no documents; check the inputs")

    @classmethod
    def open(cls, path: Path | str | Sequence[Path | str]) -> "Dataset":
        """Open a folder of shards, one shard (`folder/name`, with or without a suffix), or a list of either.

        Shards come in the order of their names. Files without a manifest are unfinished and left out.

        Raises:
            ValueError: nothing there, an unfinished or damaged shard, or mixed vocabularies.
        """
        paths = [path] if isinstance(path, Path | str) else list(path)
        return cls([ShardReader(prefix) for item in paths for prefix in shard_prefixes(Path(item))])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """A hash of all ids, their documents and their order, and of the vocabulary."""
        content = [self.vocabulary.fingerprint, *(shard.manifest.content_hash for shard in self.shards)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the text tokenizer."""
        return self.shards[0].manifest.tokenizer

    @property
    def image_tokenizer(self) -> str | None:
        """Fingerprint of the picture tokenizer; None when all shards were made without one."""
        return next((s.manifest.image_tokenizer for s in self.shards if s.manifest.image_tokenizer), None)

    @property
    def num_tokens(self) -> int:
        """All ids of all documents."""
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        """The ids of a document [length]: a read-only view of the file in its dtype (uint16 or int32)."""
        shard, local = self._locate(index)
        return shard.document(local)

    def image_spans(self, index: int) -> np.ndarray:
        """Pictures of a document: int32 [n, 2] of (start, length), begin and end ids included."""
        shard, local = self._locate(index)
        return shard.image_spans(local)

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"document {index} of {len(self.lengths)}")
        number = int(np.searchsorted(self._shard_ends, index, side="right"))
        shard = self.shards[number]
        return shard, int(index - self._shard_ends[number] + len(shard))

    def _require_same_tokenizers(self) -> None:
        """Shards without pictures may lack a picture tokenizer; all others must have the same."""
        for name in ("tokenizer", "image_tokenizer"):
            # reversed, so that errors name the first shard of each
            found = {getattr(shard.manifest, name): shard.prefix for shard in reversed(self.shards)}
            found.pop(None, None)
            if len(found) > 1:
                made = ", ".join(f"{prefix} with {fingerprint}" for fingerprint, prefix in sorted(found.items()))
                raise ValueError(f"dataset: shards of different {name}s: {made}; preprocess all with the same one")


def shard_prefixes(path: Path) -> list[Path]:
    """The shards that `path` names: all finished ones of a folder, or the one."""
    # a plan says which shards there must be; without one, only finished ones can be seen
    if (path / PLAN_FILE).exists():
        return _planned_prefixes(path)
    if not path.is_dir():
        prefix = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in _SHARD_SUFFIXES else path
        if not any(shard_file(prefix, suffix).exists() for suffix in _SHARD_SUFFIXES):
            raise ValueError(f"{path}: no such folder or shard; check the path or run preprocess_data.py first")
        return [prefix]
    finished = [
        file.with_name(file.name.removesuffix(".json"))
        for file in sorted(path.glob("*.json"))
        if file.with_name(file.name.removesuffix(".json") + ".idx").exists() or is_shard_manifest(_json_or_none(file))
    ]
    if not finished:
        unfinished = len(list(path.glob("*.bin"))) or len(list(path.glob(".*.bin.*.tmp")))
        remedy = f"{unfinished} unfinished ones without a manifest are there; " if unfinished else ""
        raise ValueError(f"{path}: no finished shards in this folder; {remedy}run preprocess_data.py (again)")
    return finished


def _planned_prefixes(folder: Path) -> list[Path]:
    """The shards of all units of the folder's plan, none of which may be missing."""
    prefixes = [folder / name for name in planned_units(folder)]
    missing = [prefix.name for prefix in prefixes if not shard_file(prefix, ".json").exists()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(prefixes)} planned units are not finished ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); run preprocess_data.py again, or name the finished shards"
        )
    return prefixes


_SHARD_SUFFIXES = (*DATA_SUFFIXES, ".json")


def _json_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None
