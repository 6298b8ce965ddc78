"""Training the small image tokenizer: distances of pixels and of their differences, by Muon."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megachameleon.tokens.vq.losses import reconstruction_terms
from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.optimizer import MuonAdam
from megachameleon.tokens.vq.processes import average
from megachameleon.tokens.vq.tokenizer import flatten, unflatten
from megachameleon.tokens.vq.trainer import Trainer, TrainingConfig

WARMUP = 30
"""Steps in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class PatchTraining(TrainingConfig):
    """How a `PatchAutoencoder` is trained."""

    steps: int = 750
    batch_size: int = 32
    num_codes: int = 1024
    learning_rate: float = 0.015
    """Peak of Muon's, for kernels; warmed up over 30 steps, then a cosine down to a hundredth."""
    continuous_part: float = 0.1
    """Part of the steps before the codebook comes in."""
    codebook_decay: float = 0.98
    l1_weight: float = 1.0
    l2_weight: float = 4.0
    edge_weight: float = 0.5
    """Weight of the L1 distance between differences of neighbouring pixels: keeps outlines crisp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_codes < 1:
            raise ValueError(f"num_codes={self.num_codes} must be at least 1")

    @property
    def first_quantized_step(self) -> int:
        """The step from which on codes are used."""
        return max(1, round(self.steps * self.continuous_part))


class PatchTrainer(Trainer):
    """See the module's docstring."""

    evaluation_batch = 64

    def __init__(self, shape: PatchConfig, config: PatchTraining, device: torch.device) -> None:
        super().__init__(shape, config, config.num_codes, device)
        self.config = config
        # before the network is made, so that all processes start from the same weights
        torch.manual_seed(config.seed)
        self.network = PatchAutoencoder(shape).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = MuonAdam(self.network)

    @property
    def trained(self) -> PatchAutoencoder:
        """What gradients move."""
        return self.network

    def step(self, step: int, pictures: Tensor) -> dict[str, Tensor]:
        """One update; returns what is measured, by name."""
        batch = self.to_device(pictures)
        with self.autocast():
            vectors = flatten(self.network.encode(batch))
        used, commitment, indices = self.quantize(vectors, step)
        with self.autocast():
            output = self.network.decode(unflatten(used, self.grid)).float()
        terms = {**reconstruction_terms(output, batch), "commitment": commitment}
        loss = self._total(terms)
        self.optimizer.zero_grad()
        loss.backward()
        reported = {name: term.detach() for name, term in {"loss": loss, **terms}.items()}
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        average([*gradients, *reported.values()])
        self.optimizer.step(step, self.learning_rate(step))
        if indices is not None:
            self.follow(vectors.detach(), indices, step)
        return reported

    def learning_rate(self, step: int) -> float:
        """Warm-up, then a cosine."""
        warmup = min(1.0, (step + 1) / WARMUP)
        return self.config.learning_rate * warmup * (0.505 + 0.495 * math.cos(math.pi * step / self.config.steps))

    def state(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name."""
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        optimizer = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        return network | self.codebook_state() | optimizer

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        c = self.config
        weights = {"l1": c.l1_weight, "l2": c.l2_weight, "edge": c.edge_weight, "commitment": c.commitment}
        return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
