"""What the training of either network has in common: the codebook's life, evaluation and state.

The first steps train a plain autoencoder. Then k-means places the codes among its vectors, and from there on the
decoder sees codes, gradients pass straight through, and the codes follow by moving averages.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megachameleon.tokens.vq.chance import generator
from megachameleon.tokens.vq.processes import rank_and_world
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import (
    PRECISIONS,
    Network,
    Shape,
    flatten,
    to_float,
    to_uint8,
    unflatten,
    without_tf32,
)

KMEANS_PICTURES = 1024
KMEANS_VECTORS_PER_CODE = 64
"""Bounds on the vectors that place the first codes."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an image tokenizer is trained; what both networks share."""

    steps: int
    batch_size: int
    """Pictures in a step, over all processes."""
    learning_rate: float
    commitment: float = 0.25
    """Weight of the distance between vectors and their codes."""
    codebook_decay: float = 0.99
    """Of the codes' moving averages, each step."""
    revive_until: float = 0.8
    """Part of the steps after which unused codes are left alone, so that the rest can settle."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for autocast; the weights are fp32 in both."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be {' or '.join(PRECISIONS)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must lie between 0 and 1")
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f"codebook_decay={self.codebook_decay} must lie between 0 and 1, as 0.99 does")
        if self.commitment < 0:
            raise ValueError(f"commitment={self.commitment} must not be negative")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie between 0 and {2**31 - 1}")

    @property
    def first_quantized_step(self) -> int:
        """Steps before the codebook comes in."""
        raise NotImplementedError


class Trainer(ABC):
    """Networks, codebook and optimizers, with a step. All chance is a pure function of (seed, step)."""

    evaluation_batch: int
    """Pictures that pass through the network at once when it is not trained."""

    def __init__(self, shape: Shape, config: TrainingConfig, num_codes: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._config = config
        self.rank, self.world_size = rank_and_world()
        if config.batch_size % self.world_size:
            raise ValueError(f"--batch-size {config.batch_size} does not divide over {self.world_size} processes")
        self.grid = (shape.grid, shape.grid)
        self.codebook = Codebook(num_codes, shape.code_dim).to(device)

    @property
    @abstractmethod
    def trained(self) -> Network:
        """The network whose weights the steps change."""

    @property
    def evaluated(self) -> Network:
        """The network that is evaluated and saved."""
        return self.trained

    @abstractmethod
    def step(self, step: int, pictures: Tensor) -> dict[str, Tensor]:
        """Train on this process's share of a batch.

        Args:
            step: from 0.
            pictures: uint8 [B, 3, S, S].

        Returns:
            Scalars, averaged over the batch and all processes; `loss` and `l2` (of pixels in -1..1) among them.
        """

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on; views, so that copying into them restores."""

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def prepare(self, step: int, sample: Callable[[int], Iterable[Tensor]]) -> None:
        """What comes before a step: k-means before the first one with codes.

        Args:
            sample: a count to chunks uint8 [B, 3, S, S] of so many training pictures.
        """
        if step != self._config.first_quantized_step:
            return
        cells = self.grid[0] * self.grid[1]
        # enough vectors for each code, and no more memory than that
        count = min(KMEANS_PICTURES, max(1, KMEANS_VECTORS_PER_CODE * self.codebook.num_codes // cells))
        chunks = sample(count)
        # of the trained weights, not averaged ones: these vectors are what the next step quantises
        vectors = torch.cat([flatten(self.trained.encode(self.to_device(chunk))) for chunk in chunks])
        self.codebook.initialise(vectors, self._config.batch_size * cells, self._generator(step))

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Through the codebook in fp32: uint8 [B, 3, S, S] to the same and codes int64 [B, cells], on the CPU."""
        # as the finished tokenizer computes, so that its scores are those reported
        with without_tf32():
            indices = self.codebook.nearest(flatten(self.evaluated.encode(self.to_device(pictures))))
            output = to_uint8(self.evaluated.decode(unflatten(self.codebook.lookup(indices), self.grid)))
        return output.cpu(), indices.view(len(pictures), -1).cpu()

    def quantize(self, vectors: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors [N, code_dim] to what the decoder sees, the commitment term, and codes int64 [N] once there are."""
        if step < self._config.first_quantized_step:
            return vectors, torch.zeros((), device=self.device), None
        indices = self.codebook.nearest(vectors.detach())
        codes = self.codebook.lookup(indices)
        # straight-through: codes forwards, the identity backwards (van den Oord et al., 2017)
        return vectors + (codes - vectors).detach(), F.mse_loss(vectors, codes), indices

    def follow(self, vectors: Tensor, indices: Tensor, step: int) -> None:
        """Let the codes follow this step's vectors [N, code_dim], those of all processes together."""
        self.codebook.update(vectors, indices, self._config.codebook_decay)
        if step < self._config.revive_until * self._config.steps:
            self.codebook.revive(vectors, indices, self._generator(step))

    def autocast(self) -> torch.autocast:
        """The precision of the networks in training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.precision == "bf16")

    def to_device(self, pictures: Tensor) -> Tensor:
        """uint8 pictures to float -1..1 where the network is."""
        return to_float(pictures.to(self.device)).contiguous(memory_format=torch.channels_last)

    def codebook_state(self) -> dict[str, Tensor]:
        """The codebook's part of `state`."""
        return {f"codebook.{name}": getattr(self.codebook, name) for name in ("codes", "counts", "sums")}

    def _generator(self, step: int) -> torch.Generator:
        return generator(self._config.seed, "codes", step)
