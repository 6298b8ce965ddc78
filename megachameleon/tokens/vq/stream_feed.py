"""Pictures decoded when they are needed, in background threads: for sets that do not fit in memory.

Decoding and resizing release Python's lock, so threads are enough. Every random choice (order, crop, flip, what stands
in for a damaged picture) is a pure function of (seed, place), so it matters neither when nor where it is made.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from megachameleon.tokens.pictures import open_picture, prepare_picture
from megachameleon.tokens.vq.chance import generator
from megachameleon.tokens.vq.feed import Feed, FeedConfig
from megachameleon.tokens.vq.memory_feed import require_enough
from megachameleon.tokens.vq.order import Order
from megachameleon.tokens.vq.source import PictureFile

STEPS_AHEAD = 2
"""Batches that are decoded while the current one is trained on."""
ATTEMPTS = 32
"""Pictures tried for one place before training stops; with half of them damaged it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random changes of training pictures."""

    zoom: float = 1.1
    """A crop's side is the short side divided by 1 to this, its place anywhere in the picture; 1 crops only along the
    long side."""
    flip: bool = True
    """Mirror every other picture, left to right."""

    def __post_init__(self) -> None:
        if not 1 <= self.zoom <= 4:
            raise ValueError(f"--zoom {self.zoom} must lie between 1 and 4")


@dataclass(frozen=True, slots=True)
class Split:
    """Files to train on and files to hold out."""

    train: list[PictureFile]
    held_out: list[PictureFile]
    num_duplicates: int
    """Training files left out because their bytes equal a held-out picture's."""
    num_files: int
    """Files given, those left out included."""
    quarantine: list[dict[str, str]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """A hash of names, places and sizes of all files; contents are not read."""
        digest = hashlib.sha256()
        for files in (self.train, self.held_out):
            for file in files:
                digest.update(repr((file.origin, file.offset, file.size, file.tags)).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]


def split_files(files: Sequence[PictureFile], *, held_out: int, max_pictures: int | None = None) -> Split:
    """Hold pictures out: those whose name and size have the smallest hashes, at most a tenth of all.

    They are decoded once to see that they can be. Training files with the bytes of one of them are left out.

    Args:
        max_pictures: train on at most so many, those with the next smallest hashes.

    Raises:
        ValueError: too few pictures.
    """
    # by name and size, not by place: moving or re-packing files keeps what is held out
    ranked = sorted(
        files, key=lambda file: hashlib.sha256(f"{file.name or file.path.name}:{file.size}".encode()).digest()
    )
    wanted = max(1, min(held_out, len(files) // 10))
    chosen: dict[bytes, PictureFile] = {}
    quarantine: list[dict[str, str]] = []
    remaining = iter(ranked)
    while len(chosen) < wanted and (file := next(remaining, None)) is not None:
        try:
            data = file.read()
            open_picture(data, file.origin)
            chosen.setdefault(hashlib.sha256(data).digest(), file)
        except (ValueError, OSError) as error:
            quarantine.append({"origin": file.origin, "reason": str(error)})
    # equal bytes have equal sizes, so hardly any file need be read
    sizes = {file.size for file in chosen.values()}
    train = [file for file in remaining if file.size not in sizes or not _is_among(file, chosen)]
    require_enough(len(train) + len(chosen), len(files), quarantine)
    num_duplicates = len(files) - len(train) - len(chosen) - len(quarantine)
    return Split(train[:max_pictures], list(chosen.values()), num_duplicates, len(files), quarantine)


class StreamFeed(Feed):
    """Batches decoded on the fly.

    Args:
        weights: of `split.train`, see `Order`.
        workers: threads of this process.
    """

    def __init__(
        self,
        split: Split,
        config: FeedConfig,
        augmentation: Augmentation,
        *,
        weights: np.ndarray | None = None,
        workers: int = 4,
    ) -> None:
        super().__init__(config, Order(len(split.train), config.seed, weights))
        self._split, self._augmentation = split, augmentation
        self.fingerprint = split.fingerprint
        self.num_train, self.num_held_out = len(split.train), len(split.held_out)
        self.num_files, self.num_duplicates = split.num_files, split.num_duplicates
        self.quarantine = list(split.quarantine)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
        self._lock, self._unusable = threading.Lock(), {entry["origin"] for entry in self.quarantine}
        self._ahead: dict[int, list[Future[np.ndarray]]] = {}

    def batch(self, step: int) -> Tensor:
        """See `Feed.batch`; a picture that cannot be decoded is set aside, and one drawn by chance takes its place.

        Raises:
            ValueError: many pictures in a row could not be decoded.
        """
        for wanted in range(step, min(step + STEPS_AHEAD + 1, self.config.steps)):
            if wanted not in self._ahead:
                places = self.places(wanted)
                numbers = self.order.at(places.start, places.stop).tolist()
                pairs = zip(places, numbers, strict=True)
                self._ahead[wanted] = [self._pool.submit(self._draw, place, number) for place, number in pairs]
        return _stacked([future.result() for future in self._ahead.pop(step)])

    def sample(self, count: int) -> Iterator[Tensor]:
        """See `Feed`."""
        chance = generator(self.config.seed, "sample", 0)
        chosen = torch.randperm(self.num_train, generator=chance)[:count].tolist()
        return self._chunks([self._split.train[number] for number in chosen])

    def held_out(self) -> Iterator[Tensor]:
        """See `Feed`."""
        return self._chunks(self._split.held_out[self.rank :: self.world_size])

    def trained_on(self) -> Iterator[Tensor]:
        """See `Feed`."""
        return self._chunks(self._split.train[: self.num_held_out][self.rank :: self.world_size])

    def shown(self, count: int) -> Tensor:
        """See `Feed`."""
        return torch.cat(list(self._chunks(self._split.held_out[:count])))

    def close(self) -> None:
        """See `Feed`."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _draw(self, place: int, number: int) -> np.ndarray:
        # of the place alone, so it matters not which thread draws, or when
        chance = np.random.default_rng((self.config.seed, place))
        for _ in range(ATTEMPTS):
            file = self._split.train[number]
            try:
                return self._augmented(file, chance)
            except (ValueError, OSError) as error:
                reason = self._set_aside(file, error)
            number = self.order.by_chance(chance)
        raise ValueError(
            f"{ATTEMPTS} pictures in a row could not be decoded, the last: {reason}; look at quarantine.jsonl"
        )

    def _augmented(self, file: PictureFile, chance: np.random.Generator) -> np.ndarray:
        # all drawn before anything can fail, so that a stand-in begins at a fixed point
        zoom, left, top, flip = chance.random(4)
        image = open_picture(file.read(), file.origin)
        side = max(1, round(min(image.size) / (1 + zoom * (self._augmentation.zoom - 1))))
        x, y = round(left * (image.width - side)), round(top * (image.height - side))
        pixels = prepare_picture(image.crop((x, y, x + side, y + side)), self.config.image_size)
        return pixels[:, :, ::-1] if self._augmentation.flip and flip < 0.5 else pixels

    def _prepared(self, file: PictureFile) -> np.ndarray | None:
        try:
            return prepare_picture(open_picture(file.read(), file.origin), self.config.image_size)
        except (ValueError, OSError) as error:
            self._set_aside(file, error)
            return None

    def _set_aside(self, file: PictureFile, error: Exception) -> str:
        with self._lock:
            if file.origin not in self._unusable:
                self._unusable.add(file.origin)
                self.quarantine.append({"origin": file.origin, "reason": str(error)})
        return str(error)

    def _chunks(self, files: Sequence[PictureFile]) -> Iterator[Tensor]:
        remaining = iter(files)
        while part := list(islice(remaining, self.config.chunk)):
            pictures = [pixels for pixels in self._pool.map(self._prepared, part) if pixels is not None]
            if pictures:
                yield _stacked(pictures)


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


def _is_among(file: PictureFile, chosen: dict[bytes, PictureFile]) -> bool:
    try:
        return hashlib.sha256(file.read()).digest() in chosen
    except (ValueError, OSError):
        return False  # it will be set aside when it is drawn
