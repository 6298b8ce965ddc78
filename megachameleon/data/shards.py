"""Shards: documents of token ids on disk, and datasets made of shards.

A shard is `PREFIX.bin` (ids) and `PREFIX.idx`, byte for byte what megatron-core's IndexedDatasetBuilder writes for one
sequence a document, `PREFIX.spans` (where pictures lie) and `PREFIX.json`, the manifest, which is written last: what
has no matching manifest does not exist. The formats are in `shard_format`.
"""

import glob
import hashlib
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from megachameleon.data.manifest import DATA_SUFFIXES, FileRecord, ShardManifest, is_shard_manifest
from megachameleon.data.plan import PLAN_FILE, planned_units
from megachameleon.data.shard_format import read_idx, read_spans, write_idx, write_spans
from megachameleon.files import read_json, sha256_of, sync_directory
from megachameleon.tokens.vocabulary import Vocabulary

WRITE_BUFFER = 1 << 22


def shard_file(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`; unlike Path.with_suffix, dots in the prefix stay."""
    return prefix.with_name(prefix.name + suffix)


def find_image_spans(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Where pictures lie in a document: int32 [n, 2] of (start, length), begin and end ids included.

    Raises:
        ValueError: a picture is torn: codes or an end without a begin, too few or too many codes.
    """
    starts = np.flatnonzero(ids == vocabulary.begin_image)
    length = vocabulary.image_length
    is_code = vocabulary.is_image_code(ids)
    num_ends = np.count_nonzero(ids == vocabulary.end_image)
    whole = num_ends == len(starts) and np.count_nonzero(is_code) == len(starts) * vocabulary.codes_per_image
    if whole and len(starts):
        whole = starts[-1] + length <= len(ids) and (ids[starts + length - 1] == vocabulary.end_image).all()
    if whole and len(starts):
        inner = starts[:, None] + np.arange(1, length - 1)
        whole = bool(is_code[inner].all())
    if not whole:
        raise ValueError(
            f"document: {len(starts)} begin_image, {np.count_nonzero(is_code)} picture codes and {num_ends} end_image "
            f"do not make whole pictures of {vocabulary.codes_per_image} codes"
        )
    return np.stack((starts, np.full_like(starts, length)), axis=1).astype(np.int32)


class ShardWriter:
    """Writes one shard; nothing of it exists until `commit`.

        with ShardWriter(prefix, vocabulary, tokenizer=...) as writer:
            writer.add(ids)
            writer.commit(inputs=...)

    Two writers of the same prefix do not disturb each other: each writes its own temporary files.
    """

    def __init__(
        self, prefix: Path, vocabulary: Vocabulary, *, tokenizer: str, image_tokenizer: str | None = None
    ) -> None:
        """
        Args:
            prefix: path without suffix, `folder/name`.
            tokenizer: fingerprint of the text tokenizer.
            image_tokenizer: fingerprint of the picture tokenizer, if any.
        """
        self.prefix = prefix
        self.vocabulary = vocabulary
        self._tokenizer, self._image_tokenizer = tokenizer, image_tokenizer
        self._dtype = np.dtype(vocabulary.token_dtype).newbyteorder("<")
        self._lengths: list[int] = []
        self._span_counts: list[int] = []
        self._spans: list[np.ndarray] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(prefix)
        self._temporary = {suffix: _temporary_file(prefix, suffix, str(os.getpid())) for suffix in DATA_SUFFIXES}
        self._bin = self._temporary[".bin"].open("wb", buffering=WRITE_BUFFER)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document, bos and eos included.

        Raises:
            ValueError: empty, an id outside the vocabulary, or a torn picture. The shard stays as it was.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
            raise ValueError(f"document: expected a row of ids, got shape {array.shape} of {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocabulary.size:
            raise ValueError(
                f"document: id {low if low < 0 else high} is outside the vocabulary 0..{self.vocabulary.size - 1}; "
                "the tokenizer does not belong to this vocabulary"
            )
        spans = find_image_spans(array, self.vocabulary)
        self._bin.write(array.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(len(array))
        self._span_counts.append(len(spans))
        self._spans.append(spans)

    def commit(
        self,
        *,
        inputs: Iterable[FileRecord] = (),
        quarantined: dict[str, int] | None = None,
        filtered: int = 0,
        options: dict[str, Any] | None = None,
    ) -> ShardManifest:
        """Flush, rename into place and write the manifest; a shard of this name from before is replaced.

        Args: the fields of `ShardManifest` that the writer cannot know.
        """
        lengths = np.array(self._lengths, dtype=np.int64)
        spans = np.concatenate(self._spans) if self._spans else np.empty((0, 2), dtype=np.int32)
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with self._temporary[".idx"].open("wb") as file:
            write_idx(file, lengths, self._dtype)
            os.fsync(file.fileno())
        with self._temporary[".spans"].open("wb") as file:
            write_spans(file, np.array(self._span_counts, dtype=np.int64), spans)
            os.fsync(file.fileno())
        manifest = ShardManifest(
            vocabulary=self.vocabulary,
            tokenizer=self._tokenizer,
            image_tokenizer=self._image_tokenizer,
            dtype=self._dtype.name,
            num_documents=len(lengths),
            num_tokens=int(lengths.sum()),
            num_image_tokens=int(spans[:, 1].sum()),
            num_images=len(spans),
            files={suffix: self._record(suffix) for suffix in DATA_SUFFIXES},
            inputs=tuple(inputs),
            quarantined=dict(quarantined or {}),
            filtered=filtered,
            options=dict(options or {}),
        )
        self._publish(manifest)
        return manifest

    def _record(self, suffix: str) -> FileRecord:
        path = self._temporary[suffix]
        return FileRecord(name=self.prefix.name + suffix, bytes=path.stat().st_size, sha256=sha256_of(path))

    def _publish(self, manifest: ShardManifest) -> None:
        manifest_path = shard_file(self.prefix, ".json")
        manifest_path.unlink(missing_ok=True)  # an old manifest must not vouch for new data,
        sync_directory(self.prefix.parent)  # nor come back beside it after a crash
        for suffix, path in self._temporary.items():
            path.replace(shard_file(self.prefix, suffix))
        sync_directory(self.prefix.parent)
        manifest.save(manifest_path)


def being_written(prefix: Path) -> bool:
    """Whether another process on this machine is writing the shard."""
    pattern = _temporary_file(prefix.with_name(glob.escape(prefix.name)), ".bin", "*").name
    processes = [path.name.split(".")[-2] for path in prefix.parent.glob(pattern)]
    return any(p.isdecimal() and int(p) != os.getpid() and psutil.pid_exists(int(p)) for p in processes)


def _temporary_file(prefix: Path, suffix: str, process: str) -> Path:
    return prefix.with_name(f".{prefix.name}{suffix}.{socket.gethostname()}.{process}.tmp")


def _remove_orphans(prefix: Path) -> None:
    """Remove what writers of this shard have left that were killed on this machine; they cannot come back."""
    for suffix in DATA_SUFFIXES:
        pattern = _temporary_file(prefix.with_name(glob.escape(prefix.name)), suffix, "*").name
        for path in prefix.parent.glob(pattern):
            process = path.name.split(".")[-2]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                path.unlink(missing_ok=True)


class ShardReader:
    """One shard, memory-mapped and checked when it is opened."""

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
        for suffix in DATA_SUFFIXES:
            self._check_size(suffix)
        dtype = np.dtype(self.vocabulary.token_dtype).newbyteorder("<")
        if self.manifest.dtype != dtype.name:
            raise ValueError(f"{manifest_path}: dtype {self.manifest.dtype}, but the vocabulary needs {dtype.name}")
        self.lengths = read_idx(shard_file(prefix, ".idx"), dtype)
        self._first, self._spans = read_spans(shard_file(prefix, ".spans"), self.lengths, self.vocabulary.image_length)
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
        for index in range(len(self)):
            if not np.array_equal(find_image_spans(self.document(index), self.vocabulary), self.image_spans(index)):
                raise ValueError(f"{self.prefix}: spans of document {index} do not match its ids; {remedy}")

    def _check_size(self, suffix: str) -> None:
        path, expected = shard_file(self.prefix, suffix), self.manifest.files[suffix].bytes
        actual = path.stat().st_size if path.exists() else None
        if actual != expected:
            found = "missing" if actual is None else f"{actual:,} bytes"
            raise ValueError(f"{path}: {found}, but the manifest says {expected:,} bytes; preprocess the data again")

    def _check_counts(self, dtype: np.dtype) -> None:
        manifest = self.manifest
        actual = (len(self.lengths), int(self.lengths.sum()), len(self._spans), int(self._spans[:, 1].sum()))
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
        return cls([ShardReader(prefix) for item in paths for prefix in _shard_prefixes(Path(item))])

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
            found = {getattr(shard.manifest, name): shard.prefix for shard in reversed(self.shards)}
            found.pop(None, None)
            if len(found) > 1:
                made = ", ".join(f"{prefix} with {fingerprint}" for fingerprint, prefix in sorted(found.items()))
                raise ValueError(f"dataset: shards of different {name}s: {made}; preprocess all with the same one")


def _shard_prefixes(path: Path) -> list[Path]:
    """The shards that `path` names: all finished ones of a folder, or the one."""
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
