"""Codes of pictures: made in batches, filled into blocks, and remembered by the pictures' content."""

import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from megachameleon.data.records import PictureSegment
from megachameleon.files import NoRoomError

if TYPE_CHECKING:
    from megachameleon.data.preprocessing.block import Block
    from megachameleon.data.preprocessing.picture_encoder import PictureEncoder
    from megachameleon.tokens.vocabulary import Vocabulary

PREPARATION = 1
"""Counts changes of how pictures are prepared, so that codes of before are not used."""
MAX_WAITING = 64
"""Blocks that may wait for a batch of pictures to fill."""


def code_key(picture: PictureSegment, exact: bool) -> str:
    """What a picture's codes depend on beside the image tokenizer: content and preparation."""
    return f"{PREPARATION}:{picture.fit}:{'exact' if exact else 'fast'}:{picture.content_hash}"


class CodeCaches:
    """Codes by key in SQLite files: one that is added to, on a local disk, and any number that are only read."""

    def __init__(
        self, folders: Sequence[Path], fingerprint: str, codes_per_image: int, *, read_only: bool = False
    ) -> None:
        """
        Args:
            folders: the first one is added to, unless `read_only`; of those, what is not there is left out.
            fingerprint: of the image tokenizer; each has a file of its own.

        Raises:
            ValueError: a file is not such a cache.
        """
        self._size = codes_per_image
        self._files: list[tuple[Path, sqlite3.Connection]] = []
        for number, folder in enumerate(folders):
            path = folder / f"codes-{fingerprint}.sqlite"
            if number == 0 and not read_only:
                folder.mkdir(parents=True, exist_ok=True)
                self._files.append((path, self._create(path)))
            elif path.exists():
                with _problems_named(path):
                    # the first may be written meanwhile; the others may lie where locks do not work
                    how = "mode=ro" if number == 0 else "mode=ro&immutable=1"
                    self._files.append(
                        (path, sqlite3.connect(f"{path.absolute().as_uri()}?{how}", timeout=120, uri=True))
                    )

    def _create(self, path: Path) -> sqlite3.Connection:
        with _problems_named(path):
            connection = sqlite3.connect(path, timeout=120)
            connection.execute("PRAGMA journal_mode=WAL")  # readers need not wait for the writer
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS codes (key TEXT PRIMARY KEY, codes BLOB NOT NULL) WITHOUT ROWID"
            )
            connection.commit()
            return connection

    def get(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The codes int32 [codes_per_image] of those pictures that are known.

        Raises:
            ValueError: a file is damaged or locked for minutes; likewise `put`.
        """
        found: dict[str, np.ndarray] = {}
        missing = list(keys)
        for path, connection in self._files:
            with _problems_named(path):
                for key in missing:
                    rows = connection.execute("SELECT codes FROM codes WHERE key = ?", (key,)).fetchall()
                    # a damaged entry counts as unknown: the codes are computed again
                    if rows and (codes := self._checked(key, rows[0][0])) is not None:
                        found[key] = codes
            missing = [key for key in missing if key not in found]
        return found

    def put(self, codes: dict[str, np.ndarray]) -> None:
        """Remember codes in the first file."""
        path, connection = self._files[0]
        rows = []
        for key, value in codes.items():
            data = value.astype("<i4").tobytes()
            rows.append((key, data + _check(key, data)))
        with _problems_named(path), connection:
            connection.executemany("INSERT OR REPLACE INTO codes VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the files."""
        for _, connection in self._files:
            connection.close()

    def _checked(self, key: str, blob: bytes) -> np.ndarray | None:
        if len(blob) != 4 * self._size + 4 or _check(key, blob[:-4]) != blob[-4:]:
            return None
        return np.frombuffer(blob, "<i4", self._size)


def _check(key: str, data: bytes) -> bytes:
    return crc32(data, crc32(key.encode())).to_bytes(4, "little")


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        # sqlite3 has no error class of its own for a full disk
        if "full" in str(error):
            raise NoRoomError(
                f"{path}: no room left for the code cache; free some, or choose another disk with --code-cache; "
                "finished units stay, run again"
            ) from None
        raise ValueError(
            f"{path}: unusable code cache ({error}); remove the file, or choose another --code-cache"
        ) from None


@dataclass(slots=True)
class PictureCounts:
    """Where codes came from."""

    pictures: int = 0
    """In documents, each as often as it stands there."""
    cached: int = 0
    """Distinct ones in their block that a cache or this run knew."""
    encoded: int = 0
    """Distinct ones that the image tokenizer had to encode."""


class CodeFiller:
    """Fills the holes of blocks. Pictures are encoded in full batches, over blocks; blocks leave in order."""

    def __init__(
        self,
        encoder: "PictureEncoder | None",
        vocabulary: "Vocabulary",
        cache: CodeCaches | None,
        counts: PictureCounts,
        remember: int = 16_384,
    ) -> None:
        """
        Args:
            encoder: None where no picture comes.
            cache: is given fresh codes.
            counts: is added to.
            remember: pictures whose codes are kept in memory.
        """
        self._encoder, self._vocabulary, self._cache = encoder, vocabulary, cache
        self._counts, self._limit = counts, remember
        self._known: dict[str, np.ndarray] = {}
        self._waiting: deque[Block] = deque()
        self._missing: dict[str, np.ndarray] = {}
        self._unsaved: dict[str, np.ndarray] = {}

    def add(self, block: "Block") -> Iterator["Block"]:
        """Take a block; gives back those that are complete now."""
        self._known |= block.codes
        self._counts.pictures += len(block.keys)
        distinct = set(block.keys)
        # decided here and not by workers, which do not know what other blocks bring
        fresh = {
            key: pixels for key, pixels in block.pixels.items() if key not in self._known and key not in self._missing
        }
        self._counts.cached += len(distinct) - len(fresh)
        block.pixels = {}
        self._missing |= fresh
        self._waiting.append(block)
        while self._missing and len(self._missing) >= self._batch_size():
            self._encode()
        # rare pictures would otherwise hold back blocks, and memory, without end
        if len(self._waiting) > MAX_WAITING or len(self._known) > 2 * self._limit:
            yield from self.finish()
        yield from self._complete()

    def finish(self) -> Iterator["Block"]:
        """Encode what is left and give back all blocks."""
        while self._missing:
            self._encode()
        yield from self._complete()

    def save(self) -> None:
        """Hand fresh codes to the cache."""
        if self._cache is not None and self._unsaved:
            self._cache.put(self._unsaved)
        self._unsaved = {}

    def _batch_size(self) -> int:
        assert self._encoder is not None
        return self._encoder.batch_size

    def _encode(self) -> None:
        assert self._encoder is not None
        keys = list(self._missing)[: self._batch_size()]
        pixels = np.stack([self._missing.pop(key) for key in keys])
        fresh = dict(zip(keys, self._encoder.encode(pixels), strict=True))
        self._counts.encoded += len(fresh)
        self._known |= fresh
        self._unsaved |= fresh
        if len(self._unsaved) >= 256:
            self.save()

    def _complete(self) -> Iterator["Block"]:
        # in order: the bytes of a shard must not depend on which picture was ready
        while self._waiting and not any(key in self._missing for key in self._waiting[0].keys):
            block = self._waiting.popleft()
            if block.keys:
                length = self._vocabulary.codes_per_image
                codes = np.stack([self._known[key] for key in block.keys])
                if codes.min() < 0 or codes.max() >= self._vocabulary.num_image_codes:
                    raise ValueError(
                        f"codes {codes.min()}..{codes.max()} are outside the vocabulary's; check the image tokenizer"
                    )
                where = block.holes[:, None] + np.arange(length)
                block.ids[where] = codes + self._vocabulary.image_code_start
            yield block
        # blocks that wait may need any known code, so nothing is forgotten before
        if not self._waiting:
            while len(self._known) > self._limit:
                del self._known[next(iter(self._known))]  # the oldest
