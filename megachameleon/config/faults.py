"""When a run stops by itself, and how it notices that a process is dead, hung or slow."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """Stopping politely, and not hanging."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
