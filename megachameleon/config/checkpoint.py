"""When the state is saved, how, and what is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved, how, and what is kept."""

    every: int = 1_000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older checkpoints are deleted once this many newer ones are complete."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; itself a multiple of `every`; 0: none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written from a copy in host memory; off: it waits, without a copy."""
    init_from: str | None = None
    """A checkpoint, or a run's folder, with whose weights a new run starts, at step 0 with a fresh optimizer. Once the
    run has checkpoints of its own it goes on from those."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}: {getattr(self, name)} must be at least 1")
        # Only what is saved can be kept.
        if self.keep_every < 0 or self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every: {self.keep_every} must be a multiple of checkpoint.every={self.every}, or 0"
            )
