"""One training step of the image tokenizer, the same on one process or several, CPU or CUDA.

The first steps train a plain autoencoder. Then k-means places the codes among its vectors, and from there on the
decoder sees codes, gradients pass straight through, and the codes follow by moving averages.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.optimizer import MuonAdam
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import flatten, to_float, to_uint8, unflatten

KMEANS_PICTURES = 1024
"""Pictures whose vectors place the first codes."""
EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How an image tokenizer is trained."""

    steps: int = 750
    batch_size: int = 32
    """Pictures in a step, over all processes."""
    num_codes: int = 512
    learning_rate: float = 0.015
    """Peak of Muon's, for kernels; warmed up over 30 steps, then a cosine down to a hundredth."""
    continuous_part: float = 0.1
    """Part of the steps before the codebook comes in."""
    commitment: float = 0.25
    """Weight of the distance between vectors and their codes."""
    codebook_decay: float = 0.98
    """Of the moving averages, each step."""
    revive_until: float = 0.8
    """Part of the steps after which unused codes are left alone, so that the rest can settle."""
    l1_weight: float = 1.0
    l2_weight: float = 4.0
    edge_weight: float = 0.5
    """Weight of the L1 distance between differences of neighbouring pixels: keeps outlines crisp."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for autocast; the weights are fp32 in both."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be fp32 or bf16")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must lie between 0 and 1")

    @property
    def first_quantized_step(self) -> int:
        """Steps before the codebook comes in."""
        return max(1, round(self.steps * self.continuous_part))


class Trainer:
    """Network, codebook and optimizer, with a step. All chance is a pure function of (seed, step)."""

    def __init__(self, shape: PatchConfig, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if config.batch_size % self.world_size:
            raise ValueError(f"--batch-size {config.batch_size} does not divide over {self.world_size} processes")
        torch.manual_seed(config.seed)
        self.network = PatchAutoencoder(shape).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.codebook = Codebook(config.num_codes, shape.code_dim).to(device)
        self.optimizer = MuonAdam(self.network)
        self.grid = (shape.grid, shape.grid)

    def step(self, step: int, pictures: Tensor) -> dict[str, Tensor]:
        """Train on this step's batch.

        Args:
            step: from 0.
            pictures: all training pictures, uint8 [N, 3, S, S].

        Returns:
            Loss terms, averaged over the batch and all processes.
        """
        if step == self.config.first_quantized_step:
            self._place_codes(step, pictures)
        batch = self._to_device(pictures[self._batch_indices(step, len(pictures))])
        with self._autocast():
            vectors = flatten(self.network.encode(batch))
        commitment, used = torch.zeros((), device=self.device), vectors
        indices = None
        if step >= self.config.first_quantized_step:
            indices = self.codebook.nearest(vectors.detach())
            codes = self.codebook.lookup(indices)
            commitment = F.mse_loss(vectors, codes)
            used = vectors + (codes - vectors).detach()
        with self._autocast():
            output = self.network.decode(unflatten(used, self.grid)).float()
        terms = {**reconstruction_terms(output, batch), "commitment": commitment}
        loss = self._total(terms)
        self.optimizer.zero_grad()
        loss.backward()
        terms = self._average({"loss": loss, **terms})
        self.optimizer.step(step, self.learning_rate(step))
        if indices is not None:
            self.codebook.update(vectors.detach(), indices, self.config.codebook_decay)
            if step < self.config.revive_until * self.config.steps:
                self.codebook.revive(vectors.detach(), indices, self._generator(step))
        return terms

    def learning_rate(self, step: int) -> float:
        """Warm-up, then a cosine."""
        warmup = min(1.0, (step + 1) / 30)
        return self.config.learning_rate * warmup * (0.505 + 0.495 * math.cos(math.pi * step / self.config.steps))

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Through the codebook in fp32: uint8 [B, 3, S, S] to the same and code counts int64 [num_codes]."""
        outputs, counts = [], torch.zeros(self.codebook.num_codes, dtype=torch.int64)
        for chunk in pictures.split(EVALUATION_BATCH):
            indices = self.codebook.nearest(flatten(self.network.encode(self._to_device(chunk))))
            counts += torch.bincount(indices.cpu(), minlength=len(counts))
            outputs.append(to_uint8(self.network.decode(unflatten(self.codebook.lookup(indices), self.grid))).cpu())
        return torch.cat(outputs), counts

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on."""
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        codebook = {f"codebook.{name}": getattr(self.codebook, name) for name in ("codes", "counts", "sums")}
        return network | codebook | {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    def _place_codes(self, step: int, pictures: Tensor) -> None:
        chosen = torch.randperm(len(pictures), generator=self._generator(step))[:KMEANS_PICTURES]
        with torch.no_grad():
            vectors = torch.cat(
                [flatten(self.network.encode(self._to_device(c))) for c in pictures[chosen].split(EVALUATION_BATCH)]
            )
        vectors_per_step = self.config.batch_size * self.grid[0] * self.grid[1]
        self.codebook.initialise(vectors, vectors_per_step, self._generator(step))

    def _batch_indices(self, step: int, num_pictures: int) -> Tensor:
        """This process's part of the step's batch; each epoch visits each picture once, in a new order."""
        start = step * self.config.batch_size
        indices = list(_epochs(start, start + self.config.batch_size, num_pictures, self.config.seed))
        return torch.tensor(indices[self.rank :: self.world_size])

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.config.seed << 32) + step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _to_device(self, pictures: Tensor) -> Tensor:
        return to_float(pictures.to(self.device)).contiguous(memory_format=torch.channels_last)

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        c = self.config
        weights = {"l1": c.l1_weight, "l2": c.l2_weight, "edge": c.edge_weight, "commitment": c.commitment}
        return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()

    def _average(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average gradients and terms over the processes, in one message."""
        values = [term.detach() for term in terms.values()]
        if self.world_size > 1:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            flat = torch.cat([tensor.reshape(-1) for tensor in (*gradients, *values)])
            dist.all_reduce(flat)
            flat /= self.world_size
            parts = flat.split([tensor.numel() for tensor in (*gradients, *values)])
            for gradient, part in zip(gradients, parts, strict=False):
                gradient.copy_(part.view_as(gradient))
            values = [part.view(()) for part in parts[len(gradients) :]]
        return dict(zip(terms, values, strict=True))


def reconstruction_terms(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean L1 and L2 distances of pixels in -1..1, and the L1 distance of neighbouring pixels' differences."""
    error = output - target
    edge = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "edge": edge}


def psnr(pictures: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error over all of them together."""
    return psnr_of_error(float((pictures.float() - reconstructions.float()).square().mean()) / 255**2)


def psnr_of_error(mean_squared_error: float) -> float:
    """dB, for an error of values that span 0..1."""
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def _epochs(start: int, stop: int, size: int, seed: int) -> Iterator[int]:
    position = start
    while position < stop:
        epoch, offset = divmod(position, size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed((seed << 32) + 2**31 + epoch))
        part = order[offset : offset + stop - position]
        yield from part.tolist()
        position += len(part)
