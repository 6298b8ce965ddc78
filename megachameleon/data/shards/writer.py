"""Writing a shard: everything under temporary names, hashed on the way, renamed when whole, the manifest last."""

import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from megachameleon.data.shards.document_checks import checked_lengths, find_pictures, require_ids
from megachameleon.data.shards.format import write_idx, write_spans
from megachameleon.data.shards.manifest import DATA_SUFFIXES, FileRecord, ShardManifest
from megachameleon.data.shards.reader import shard_file
from megachameleon.files import sha256_of, sync_directory
from megachameleon.tokens.vocabulary import Vocabulary

WRITE_BUFFER = 1 << 22
"""Bytes that are gathered before each write."""
STALE_AFTER = 120.0
"""Seconds after which what another machine holds for a moment (a lock of renames) counts as left behind."""
SILENT_AFTER = 900.0
"""Seconds without a write after which a writer on another machine is no longer called running."""
CLOCKS_APART = 60.0
"""Seconds that the clocks of this machine and of the files may be apart."""
_TEMPORARY = re.compile(
    r"\.(?P<name>.+?)\.(bin|idx|spans|json|quarantine\.jsonl|failed\.txt)"
    r"\.(?P<host>.+?)(\.[0-9a-f]{8})?\.(?P<process>[0-9]+)\.tmp"
)


class ShardWriter:
    """Writes one shard; nothing of it exists until `commit`.

        with ShardWriter(prefix, vocabulary, tokenizer=...) as writer:
            writer.add(ids)
            writer.commit(inputs=...)

    Two writers of the same prefix, also on two machines, do not disturb each other: each writes its own temporary
    files, and only one at a time puts them in place.
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
        self.num_documents = 0
        """Documents so far."""
        self._lengths: list[np.ndarray] = []
        self._span_counts: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = {suffix: _temporary_file(prefix, suffix) for suffix in DATA_SUFFIXES}
        self._bin = _HashedFile(self._temporary[".bin"])

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk fails once more when buffers are flushed
            self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document, bos and eos included.

        Raises:
            ValueError: empty, an id outside the vocabulary, or a torn picture. The shard stays as it was.
        """
        array = np.asarray(ids)
        self.add_block(array, np.array([array.size]))

    def add_block(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append several documents at once.

        Args:
            ids: integers [sum of lengths], the documents one after the other.
            lengths: integers [documents], each at least 1.

        Raises:
            ValueError: lengths that do not fit, an id outside the vocabulary, or a torn picture; names the document.
                The shard stays as it was.
        """
        # all checks before the first write, so a refused block leaves the shard as it was
        lengths = checked_lengths(ids, lengths, first=self.num_documents)
        require_ids(ids, lengths, self.vocabulary, first=self.num_documents)
        counts, spans = find_pictures(ids, lengths, self.vocabulary, first=self.num_documents)
        # narrowed only now: in uint16 an id of 65,536 or more would wrap without a word
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._lengths.append(lengths)
        self.num_documents += len(lengths)
        self._span_counts.append(counts)
        self._spans.append(spans)

    def copy(self, blob: Iterable[bytes], lengths: np.ndarray, counts: np.ndarray, spans: np.ndarray) -> None:
        """Append documents of another shard of the same vocabulary as they are, unchecked.

        Args:
            blob: the other shard's `.bin` in pieces.
            lengths: int64 [documents] in ids.
            counts: int64 [documents], pictures of each.
            spans: int32 [pictures, 2], as in `.spans`.
        """
        self.num_documents += len(lengths)
        for piece in blob:
            self._bin.write(piece)
        self._lengths.append(lengths)
        self._span_counts.append(counts)
        self._spans.append(spans)

    def commit(
        self,
        *,
        inputs: Iterable[FileRecord] = (),
        quarantined: dict[str, int] | None = None,
        filtered: int = 0,
        duplicates: int = 0,
        options: dict[str, Any] | None = None,
    ) -> ShardManifest:
        """Flush, rename into place and write the manifest; a shard of this name from before is replaced.

        Args: the fields of `ShardManifest` that the writer cannot know.
        """
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int64)])
        counts = np.concatenate([*self._span_counts, np.empty(0, np.int64)])
        spans = np.concatenate([*self._spans, np.empty((0, 2), np.int32)])
        idx, spans_file = _HashedFile(self._temporary[".idx"]), _HashedFile(self._temporary[".spans"])
        write_idx(idx, lengths, self._dtype)
        write_spans(spans_file, counts, spans)
        files = {}
        for suffix, file in ((".bin", self._bin), (".idx", idx), (".spans", spans_file)):
            # on the disk before the renames, or a crash could leave names without contents
            file.close(sync=True)
            files[suffix] = FileRecord(name=self.prefix.name + suffix, bytes=file.bytes, sha256=file.sha256)
        manifest = ShardManifest(
            vocabulary=self.vocabulary,
            tokenizer=self._tokenizer,
            image_tokenizer=self._image_tokenizer,
            dtype=self._dtype.name,
            num_documents=len(lengths),
            num_tokens=int(lengths.sum()),
            num_image_tokens=int(spans[:, 1].sum(dtype=np.int64)),
            num_images=len(spans),
            files=files,
            inputs=tuple(inputs),
            quarantined=dict(quarantined or {}),
            filtered=filtered,
            duplicates=duplicates,
            options=dict(options or {}),
        )
        self._publish(manifest)
        return manifest

    def _publish(self, manifest: ShardManifest) -> None:
        manifest_path = shard_file(self.prefix, ".json")
        with _alone(self.prefix):
            # two runs of one unit may end together; what is whole need not be renamed over
            if _is_there(self.prefix, manifest):
                return  # another run has just made the very same
            manifest_path.unlink(missing_ok=True)  # an old manifest must not vouch for new data,
            sync_directory(self.prefix.parent)  # nor come back beside it after a crash
            for suffix, path in self._temporary.items():
                path.replace(shard_file(self.prefix, suffix))
            sync_directory(self.prefix.parent)
            manifest.save(manifest_path)


class _HashedFile:
    """A new file whose SHA-256 is known when it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=WRITE_BUFFER)
        self._hash = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def close(self, *, sync: bool = False) -> None:
        if sync:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def open_writers(folder: Path) -> dict[str, str]:
    """Who is writing shards of a folder, by shard: living processes here, and other machines that wrote lately."""
    return {
        name: f"{host}, process {process}"
        for path, name, host, process in _temporary_files(folder)
        if (process != os.getpid() and _runs(process, path) if host == _here() else _age(path) < SILENT_AFTER)
    }


def remove_orphans(folder: Path) -> None:
    """Remove what runs have left in a folder of shards that were killed on this machine; they cannot come back."""
    for path, _, host, process in _temporary_files(folder):
        if host == _here() and not _runs(process, path):
            path.unlink(missing_ok=True)
    for lock in [path for path in folder.glob(".*.lock") if _left_behind(path)]:
        lock.unlink(missing_ok=True)


def _temporary_files(folder: Path) -> Iterator[tuple[Path, str, str, int]]:
    """Temporary files of shards, each with the shard's name, and host and process of its writer."""
    for path in sorted(folder.glob(".*.tmp")):
        if found := _TEMPORARY.fullmatch(path.name):
            yield path, found["name"], found["host"], int(found["process"])


def _temporary_file(prefix: Path, suffix: str) -> Path:
    # host and process tell whether the writer lives; the token, two writers in one process
    return prefix.with_name(f".{prefix.name}{suffix}.{_here()}.{uuid.uuid4().hex[:8]}.{os.getpid()}.tmp")


def _here() -> str:
    return socket.gethostname()


def _is_there(prefix: Path, manifest: ShardManifest) -> bool:
    try:
        if ShardManifest.load(shard_file(prefix, ".json")) != manifest:
            return False
        return all(sha256_of(shard_file(prefix, s)) == record.sha256 for s, record in manifest.files.items())
    except (ValueError, OSError):
        return False


@contextmanager
def _alone(prefix: Path) -> Iterator[None]:
    """Keep other writers, of all machines that see the folder, from renaming files of this shard meanwhile."""
    lock = prefix.with_name(f".{prefix.name}.lock")
    while True:
        try:
            # O_EXCL holds on network file systems too, where locks on open files may not
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            if _left_behind(lock):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(0.02)
    try:
        os.write(descriptor, f"{_here()} {os.getpid()}".encode())
        os.close(descriptor)
        yield
    finally:
        lock.unlink(missing_ok=True)


def _left_behind(lock: Path) -> bool:
    try:
        host, _, process = lock.read_text().partition(" ")
    except FileNotFoundError:
        return False
    if host == _here() and process.isdecimal():
        return not _runs(int(process), lock)
    return _age(lock) > STALE_AFTER


def _runs(process: int, file: Path) -> bool:
    """Whether the process that wrote a file still runs; another may have got its number since, as after a restart."""
    try:
        return psutil.Process(process).create_time() <= time.time() - _age(file) + CLOCKS_APART
    except psutil.NoSuchProcess:
        return False


def _age(path: Path) -> float:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0
