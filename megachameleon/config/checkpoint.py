"""When the state is saved, and what is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 1_000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older checkpoints are deleted once this many newer ones are complete."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}: {getattr(self, name)} must be at least 1")
