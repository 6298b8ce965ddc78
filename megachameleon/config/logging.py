"""What is measured, drawn and logged, and where it goes."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingConfig:
    """Pictures drawn at every validation."""

    prompts: tuple[str, ...] = ()
    temperature: float = 0.7
    top_p: float = 0.9
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 turns it off."""
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name, low, high in (("temperature", 0.01, 100.0), ("top_p", 0.01, 1.0), ("guidance", 0.0, 100.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"logging.drawing.{name}: {getattr(self, name)} must be between {low} and {high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides the terminal and metrics.jsonl."""

    tensorboard: bool = True
    drawing: DrawingConfig = field(default_factory=DrawingConfig)

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        self.drawing.validate()
