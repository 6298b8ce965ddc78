"""Which guards a configuration asks for."""

from megachameleon.config import RunConfig
from megachameleon.training.health.guards import Guard


def build_guards(config: RunConfig) -> list[Guard]:
    """In the order in which they are asked."""
    return []
