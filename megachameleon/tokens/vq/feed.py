"""What training asks its pictures for, wherever they are."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megachameleon.tokens.vq.order import Order
from megachameleon.tokens.vq.processes import rank_and_world
from megachameleon.tokens.vq.source import PictureFile


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """How pictures are drawn, the same for every process."""

    image_size: int
    """Side in pixels."""
    steps: int
    """Of the whole training; nothing is decoded for steps beyond."""
    batch_size: int
    """Pictures in a step, over all processes."""
    seed: int
    """Decides order, crops and samples."""
    chunk: int = 64
    """Pictures handed out at once where they are not a batch."""


class Feed(ABC):
    """Training batches, each a pure function of (seed, step), and pictures that are never trained on."""

    fingerprint: str
    """Of all pictures, to compare runs."""
    num_train: int
    """Pictures that are trained on."""
    num_held_out: int
    """Pictures that are not."""
    num_files: int
    """Picture files found, the unusable ones included."""
    num_duplicates: int
    """Files left out because they equal another one."""
    quarantine: list[dict[str, str]]
    """`origin` and `reason` of each file that could not be used, as far as this process has met them."""

    def __init__(self, config: FeedConfig, order: Order) -> None:
        self.config, self.order = config, order
        self.rank, self.world_size = rank_and_world()
        if config.batch_size % self.world_size:
            raise ValueError(f"--batch-size {config.batch_size} does not divide over {self.world_size} processes")

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """This process's share of a step's batch, uint8 [batch_size / processes, 3, S, S]; shares follow each other."""

    @abstractmethod
    def sample(self, count: int) -> Iterator[Tensor]:
        """At most `count` different training pictures in chunks, the same ones for every process."""

    @abstractmethod
    def held_out(self) -> Iterator[Tensor]:
        """This process's share of the held-out pictures, in chunks."""

    @abstractmethod
    def trained_on(self) -> Iterator[Tensor]:
        """This process's share of training pictures to compare the held-out ones with, in chunks."""

    @abstractmethod
    def shown(self, count: int) -> Tensor:
        """The first held-out pictures, at most `count`, for people to look at."""

    def close(self) -> None:  # noqa: B027
        """Let go of what works in the background."""

    def places(self, step: int) -> range:
        """The places in the order of this process's share of a step's batch."""
        share = self.config.batch_size // self.world_size
        start = step * self.config.batch_size + self.rank * share
        return range(start, start + share)


def picture_weights(files: Sequence[PictureFile], factors: Mapping[str, float]) -> np.ndarray | None:
    """The weight of each picture, the product of its tags' factors, float64 [files]; None without factors.

    Raises:
        ValueError: a factor is not positive, or no picture has its tag.
    """
    if not factors:
        return None
    for tag, factor in factors.items():
        if not 0 < factor < 1e6:
            raise ValueError(
                f"--weight {tag}={factor}: a factor must be positive; leave pictures out of --input instead"
            )
    known = {tag for file in files for tag in file.tags}
    for tag in factors:
        if tag not in known:
            choices = ", ".join(sorted(known)) or "none; write --input TAG=PATH or give pictures a JSON file with tags"
            raise ValueError(f"--weight {tag}: no picture has this tag; there are: {choices}")
    # by sets of tags, of which there are few, and not by pictures, which may be millions
    by_tags = {tags: float(np.prod([factors.get(tag, 1.0) for tag in set(tags)])) for tags in {f.tags for f in files}}
    return np.array([by_tags[file.tags] for file in files])
