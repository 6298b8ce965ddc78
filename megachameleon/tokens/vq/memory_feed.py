"""Pictures decoded once into one array: for small ones, or few.

Equal pictures are kept once, so that a held-out picture is never one that was trained on. Which pictures are held out
depends on their pixels alone, not on the order or the names of the files.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megachameleon.tokens.pictures import open_picture, prepare_picture
from megachameleon.tokens.vq.chance import generator
from megachameleon.tokens.vq.feed import Feed, FeedConfig
from megachameleon.tokens.vq.order import Order
from megachameleon.tokens.vq.source import MIN_PICTURES, PictureFile


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSet:
    """Prepared pictures and how they came about."""

    train: np.ndarray
    """uint8 [N, 3, size, size]."""
    held_out: np.ndarray
    """uint8 [M, 3, size, size], no picture of `train` among them."""
    weights: np.ndarray | None
    """float64 [N]: how often a training picture is drawn, relative to the others; None where all are equal."""
    quarantine: list[dict[str, str]]
    """`origin` and `reason` of each file that could not be used."""
    num_files: int
    """Picture files found, the unusable ones included."""
    num_duplicates: int
    """Usable files whose prepared pixels equal those of an earlier one."""

    @property
    def fingerprint(self) -> str:
        """A hash of all pixels."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()[:16]


class MemoryFeed(Feed):
    """Batches out of a `PictureSet`."""

    def __init__(self, pictures: PictureSet, config: FeedConfig) -> None:
        super().__init__(config, Order(len(pictures.train), config.seed, pictures.weights))
        self._train, self._held_out = torch.from_numpy(pictures.train), torch.from_numpy(pictures.held_out)
        self.fingerprint = pictures.fingerprint
        self.num_train, self.num_held_out = len(pictures.train), len(pictures.held_out)
        self.num_files, self.num_duplicates = pictures.num_files, pictures.num_duplicates
        self.quarantine = pictures.quarantine

    def batch(self, step: int) -> Tensor:
        """See `Feed`."""
        places = self.places(step)
        return self._train[torch.from_numpy(self.order.at(places.start, places.stop))]

    def sample(self, count: int) -> Iterator[Tensor]:
        """See `Feed`."""
        chosen = torch.randperm(self.num_train, generator=generator(self.config.seed, "sample", 0))[:count]
        yield from self._train[chosen].split(self.config.chunk)

    def held_out(self) -> Iterator[Tensor]:
        """See `Feed`."""
        return self._share(self._held_out)

    def trained_on(self) -> Iterator[Tensor]:
        """See `Feed`."""
        return self._share(self._train)

    def shown(self, count: int) -> Tensor:
        """See `Feed`."""
        return self._held_out[:count]

    def _share(self, pictures: Tensor) -> Iterator[Tensor]:
        mine = pictures[self.rank :: self.world_size]
        return iter(mine.split(self.config.chunk)) if len(mine) else iter(())


def load_pictures(
    files: Sequence[PictureFile],
    size: int,
    *,
    held_out: int,
    max_pictures: int,
    seed: int,
    weights: np.ndarray | None = None,
    advance: Callable[[], None] = lambda: None,
) -> PictureSet:
    """Decode and prepare pictures; set unusable ones aside; keep distinct ones, split in two.

    Args:
        files: of `find_pictures`.
        size: side in pixels.
        held_out: pictures to hold out; at most a tenth of all.
        max_pictures: of more distinct pictures, a uniform sample of this size (a reservoir) is kept, to bound memory.
        seed: of that sample.
        weights: of each file; of equal pictures the first one's counts.
        advance: called once for each file.

    Raises:
        ValueError: fewer than `MIN_PICTURES` distinct usable pictures.
    """
    chance = random.Random(seed)
    kept: list[tuple[bytes, np.ndarray, float]] = []
    seen: set[bytes] = set()
    quarantine: list[dict[str, str]] = []
    for number, file in enumerate(files):
        advance()
        try:
            pixels = prepare_picture(open_picture(file.read(), file.origin), size)
        except (ValueError, OSError) as error:
            quarantine.append({"origin": file.origin, "reason": str(error)})
            continue
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest in seen:
            continue
        # kept or not: the reservoir's chances are over all distinct pictures
        seen.add(digest)
        item = (digest, pixels, 1.0 if weights is None else float(weights[number]))
        if len(kept) < max_pictures:
            kept.append(item)
        # reservoir sampling (Vitter's algorithm R): every distinct picture is as likely to stay
        elif (place := chance.randrange(len(seen))) < max_pictures:
            kept[place] = item
    require_enough(len(kept), len(files), quarantine)
    # by hashes of pixels: which are held out must not depend on names or the order of files
    kept.sort(key=lambda item: item[0])
    split = max(1, min(held_out, len(kept) // 10))
    pictures = np.stack([pixels for _, pixels, _ in kept])
    return PictureSet(
        train=pictures[split:],
        held_out=pictures[:split],
        weights=None if weights is None else np.array([weight for _, _, weight in kept[split:]]),
        quarantine=quarantine,
        num_files=len(files),
        num_duplicates=len(files) - len(quarantine) - len(seen),
    )


def require_enough(usable: int, num_files: int, quarantine: Sequence[dict[str, str]]) -> None:
    """Refuse to train on next to nothing.

    Raises:
        ValueError: fewer than `MIN_PICTURES` pictures.
    """
    if usable < MIN_PICTURES:
        raise ValueError(
            f"--input: {usable} distinct usable pictures in {num_files} files ({len(quarantine)} set aside"
            f"{', the first: ' + quarantine[0]['reason'] if quarantine else ''}); "
            f"an image tokenizer needs at least {MIN_PICTURES}"
        )
