"""How far a run has come: all that its next step depends on besides weights and optimizer. Saved in each checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSamples:
    """Positions of the blend that training left out on purpose, after a roll-back."""

    first: int
    last: int
    """Left out as well."""
    reason: str
    """In words, as it was logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Position and memory of a run."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Position in the blend."""
    skipped: tuple[SkippedSamples, ...] = ()
    """In the order in which they were met."""
    rollbacks: int = 0
    """In the whole run; two to the same checkpoint leave one entry in `skipped`."""
    lr_factor: float = 1.0
    """The schedule's learning rate is multiplied by it; less than 1 after an alarm that asked for it."""
    guards: dict[str, Any] = field(default_factory=dict)
    """What each guard remembers, by its name."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """What each callback remembers, by its name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """The inverse of `to_dict`."""
        skipped = tuple(SkippedSamples(**item) for item in values["skipped"])
        return cls(**{**values, "skipped": skipped})
