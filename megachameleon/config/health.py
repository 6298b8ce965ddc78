"""What counts as trouble in training, and what is done about it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """Spikes and early warning."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
