"""What is measured, drawn and logged, and where it goes."""

from dataclasses import dataclass, field
from typing import Literal

MonitorName = Literal[
    "step_times",
    "output_norm",
    "block_norms",
    "attention_logits",
    "gradient_norms",
    "update_ratios",
    "picture_codes",
]


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
    monitors: tuple[MonitorName, ...] = (
        "step_times",
        "output_norm",
        "block_norms",
        "attention_logits",
        "gradient_norms",
        "update_ratios",
        "picture_codes",
    )
    """What is measured inside the step. `step_times` and `output_norm` at each; the others every `monitor_every` steps."""
    monitor_every: int = 100

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        self.drawing.validate()
        if self.monitor_every < 1:
            raise ValueError(
                f"logging.monitor_every: {self.monitor_every} must be at least 1; to measure nothing, set "
                "logging.monitors=[]"
            )
        if len(set(self.monitors)) < len(self.monitors):
            raise ValueError(f"logging.monitors: {', '.join(self.monitors)} names one twice; name it once")
