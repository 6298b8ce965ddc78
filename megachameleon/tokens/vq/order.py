"""Which picture stands at which place of the training: a pure function of seed and place, whoever asks."""

import numpy as np
import torch

from megachameleon.tokens.vq.chance import generator


class Order:
    """An endless order of pictures in epochs.

    An epoch has as many places as the weights add up to, rounded. Each picture stands in it as often as its weight
    says; of weight 1.5, once or twice, and which of the two changes from epoch to epoch. With equal weights an epoch
    visits each picture once. An epoch's order is drawn anew from (seed, epoch).

    Args:
        weights: float [pictures], positive; None for equal ones.
        num_pictures: number of pictures, at least one.
    """

    def __init__(self, num_pictures: int, seed: int, weights: np.ndarray | None = None) -> None:
        self._num_pictures, self._seed = num_pictures, seed
        self._cumulative = None if weights is None else np.cumsum(weights, dtype=np.float64)
        total = num_pictures if self._cumulative is None else self._cumulative[-1]
        self.epoch_size = max(1, round(float(total)))
        """Places in an epoch."""
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, start: int, stop: int) -> np.ndarray:
        """Picture numbers int64 [stop - start] at places from `start` to before `stop`."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_size)
            parts.append(self._epoch(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def by_chance(self, chance: np.random.Generator) -> int:
        """One picture by weight, for the place of one that cannot be used."""
        if self._cumulative is None:
            return int(chance.integers(self._num_pictures))
        return self._picture_at(np.array([chance.random() * self._cumulative[-1]]))[0]

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._drawn[0] != epoch:
            chance = generator(self._seed, "epoch", epoch)
            order = torch.randperm(self.epoch_size, generator=chance).numpy()
            if self._cumulative is not None:
                # Equidistant points on the line of all weights hit a stretch of length w floor(w) or ceil(w) times.
                shift = torch.rand((), generator=chance, dtype=torch.float64).item()
                points = (np.arange(self.epoch_size) + shift) * (self._cumulative[-1] / self.epoch_size)
                order = self._picture_at(points)[order]
            # one epoch is kept: places are asked for in order
            self._drawn = (epoch, order)
        return self._drawn[1]

    def _picture_at(self, points: np.ndarray) -> np.ndarray:
        assert self._cumulative is not None
        # rounding may put the last point at the very end of the line
        return np.minimum(np.searchsorted(self._cumulative, points, side="right"), self._num_pictures - 1)
