"""How the decoder learns: steps and optimizer."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule; defaults are Chameleon's (arXiv 2405.09818, section 2.3)."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    beta2: float = 0.95
    """Decay of Adam's mean of squared gradients."""
    eps: float = 1e-5
    """Added to the root of the latter; a thousand times torch's default."""
    weight_decay: float = 0.1
    """Applied to matrices only, never to norms and biases."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 4_000
    """Steps in which the rate rises from 0 to `lr`."""
    decay: Literal["exponential", "cosine", "linear", "constant"] = "exponential"
    """`exponential` falls from 1 to exactly 0 as 2 * 0.5^r - 1; the paper only says "exponential decay to 0"."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        if not 0 < self.lr < 1e3 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optimizer.lr: need 0 <= min_lr <= lr and 0 < lr < 1000, got lr={self.lr}, min_lr={self.min_lr}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)} must be in [0, 1)")
        for name in ("eps", "weight_decay", "clip_grad", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)} must be a number, 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The loop."""

    num_steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Samples in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 1
    """Samples in one forward pass of one rank."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware multiplies it natively, else fp32. Master weights are fp32 either way."""
    seed: int = 1234
    """Of initial weights, of dropout and of the order of samples."""
    z_loss: float = 1e-5
    """Weight of the squared log-partition in the loss (arXiv 2405.09818, section 2.3)."""
    log_every: int = 10
    """Steps between lines at the terminal and points in dashboards; metrics.jsonl has every step."""
    validate_every: int = 1_000
    """Steps between validations; 0 turns them off."""
    validation_samples: int = 256
    """Most samples of each validation set."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("num_steps", "global_batch_size", "micro_batch_size", "log_every", "validation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: {getattr(self, name)} must be at least 1")
        for name in ("validate_every", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"training.{name}: {getattr(self, name)} must be a number, 0 or more")

    def num_micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of each rank in a step.

        Raises:
            ValueError: the global batch does not divide.
        """
        samples = data_parallel * self.micro_batch_size
        if self.global_batch_size % samples:
            low = self.global_batch_size // samples * samples
            works = f"{low} or {low + samples}" if low else str(samples)
            raise ValueError(
                f"training.global_batch_size: {self.global_batch_size} is not divisible by data-parallel size "
                f"{data_parallel} x micro_batch_size {self.micro_batch_size} = {samples}; {works} would work"
            )
        return self.global_batch_size // samples
