"""Encoded pictures to codes: decoded, prepared, run through the image tokenizer, and remembered by content."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.data.records import PictureSegment

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer

ENCODE_BATCH = 16
"""Pictures in a batch, always: rounding then does not depend on which pictures were remembered."""


class CodeCache:
    """Codes by content hash, in one SQLite file that several processes may share; on a local disk."""

    def __init__(self, folder: Path, fingerprint: str, codes_per_image: int) -> None:
        """
        Args:
            fingerprint: of the image tokenizer; each has its own file.

        Raises:
            ValueError: the file is not such a cache.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"codes-{fingerprint}.sqlite"
        self._size = codes_per_image
        with self._problems_named():
            self._connection = sqlite3.connect(self._path, timeout=120)
            self._connection.execute("CREATE TABLE IF NOT EXISTS codes (picture TEXT PRIMARY KEY, codes BLOB NOT NULL)")

    def get(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The codes int32 [codes_per_image] of those pictures that are known.

        Raises:
            ValueError: the file is damaged or locked for minutes; likewise `put`.
        """
        found = {}
        with self._problems_named():
            for key in keys:
                row = self._connection.execute("SELECT codes FROM codes WHERE picture = ?", (key,)).fetchone()
                if row is not None and len(row[0]) == 4 * self._size:
                    found[key] = np.frombuffer(row[0], dtype="<i4")
        return found

    def put(self, codes: dict[str, np.ndarray]) -> None:
        """Remember codes."""
        rows = [(key, value.astype("<i4").tobytes()) for key, value in codes.items()]
        with self._problems_named(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO codes VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _problems_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self._path}: unusable code cache ({error}); remove the file, or choose another --code-cache"
            ) from None


class PictureCoder:
    """Turns pictures into codes in fixed batches; each content is encoded once."""

    def __init__(self, image_tokenizer: "ImageTokenizer", cache: CodeCache | None, remember: int = 65_536) -> None:
        """
        Args:
            remember: pictures whose codes are kept in memory.
        """
        self._tokenizer = image_tokenizer
        self._cache = cache
        self._limit = remember
        self._known: dict[str, np.ndarray] = {}

    def codes_of(self, pictures: Sequence[PictureSegment]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Codes [codes_per_image] by content hash, and by content hash why a picture is damaged, without its name."""
        wanted = {picture.content_hash: picture for picture in pictures}
        codes = {key: self._known[key] for key in wanted if key in self._known}
        if self._cache is not None:
            codes |= self._cache.get(key for key in wanted if key not in codes)
        prepared: dict[str, np.ndarray] = {}
        reasons: dict[str, str] = {}
        for key, picture in wanted.items():
            if key not in codes:
                try:
                    prepared[key] = self._prepare(picture)
                except ValueError as error:
                    reasons[key] = str(error).removeprefix(f"{picture.origin}: ")
        fresh = self._encode(prepared)
        if self._cache is not None and fresh:
            self._cache.put(fresh)
        codes |= fresh
        self._remember(codes)
        return codes, reasons

    def _remember(self, codes: dict[str, np.ndarray]) -> None:
        self._known |= codes
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]  # the oldest

    def _prepare(self, picture: PictureSegment) -> np.ndarray:
        from megachameleon.tokens.pictures import open_picture, prepare_picture

        return prepare_picture(open_picture(picture.data, picture.origin), self._tokenizer.image_size)

    def _encode(self, prepared: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keys = list(prepared)
        codes: dict[str, np.ndarray] = {}
        for start in range(0, len(keys), ENCODE_BATCH):
            batch = keys[start : start + ENCODE_BATCH]
            padded = batch + batch[-1:] * (ENCODE_BATCH - len(batch))
            encoded = self._tokenizer.encode(np.stack([prepared[key] for key in padded])).numpy().astype(np.int32)
            codes |= dict(zip(batch, encoded[: len(batch)], strict=True))
        return codes
