"""What every contestant offers, and what it is given."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from benchmarks.batches import RandomSamples
from benchmarks.contestants import MODULES
from benchmarks.same_weights import Weights
from benchmarks.shapes import Shape
from megachameleon.parallel.context import ParallelContext

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-5
WEIGHT_DECAY = 0.1
CLIP = 1.0
Z_LOSS = 1e-5


class Contestant(Protocol):
    """A model with its optimizer."""

    same_function: bool
    """Whether its first loss must equal ours."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        ...

    def load(self, weights: Weights) -> None:
        """Take these weights, before the first step."""
        ...

    def step(self, number: int) -> float:
        """Forward, backward, clip and update on batch `number`; returns the mean cross entropy, nats per token."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared."""

    shape: Shape
    precision: str
    """bf16 or fp32."""
    context: ParallelContext
    samples: RandomSamples
    documents: int
    """Documents packed in a sample."""
    peer_z_loss: bool
    """Give megatron-core a z-loss of its own, computed beside its cross entropy."""
    overrides: tuple[str, ...]
    """key.sub=value of our configuration."""


def build_contestant(name: str, settings: Settings) -> Contestant:
    """Build one by name.

    Raises:
        ValueError: what it needs is not installed.
    """
    contestant: Contestant = import_contestant(name).build(settings, variant=name.partition("-")[2])
    return contestant


def import_contestant(name: str) -> ModuleType:
    """Import what a contestant needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(f"benchmarks.contestants.{MODULES[name]}")
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"--contestants {name}: {missing.name} is not installed; install it, or leave {name} out"
        ) from None
