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
    """One picture for each; empty: nothing is drawn."""
    temperature: float = 0.7
    """Of sampling codes; this and `guidance` are Chameleon's own."""
    top_p: float = 0.9
    """Codes are drawn from the likeliest ones that have this share together."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 turns it off."""
    seed: int = 0
    """Of the draws; the same at each validation, so that pictures can be compared."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name, low, high in (("temperature", 0.01, 100.0), ("top_p", 0.01, 1.0), ("guidance", 0.0, 100.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"logging.drawing.{name}: {getattr(self, name)} must be between {low} and {high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """A run of Weights & Biases. The key comes from `wandb login` or WANDB_API_KEY, never from a configuration."""

    project: str
    name: str = ""
    """Shown for the run; empty: that of the output folder."""
    entity: str = ""
    """Team or user; empty: the default of the key."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the output folder only, for `wandb sync` later."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        if not self.project:
            raise ValueError("logging.wandb.project: empty; name the project that the run belongs to")


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """A run of MLflow."""

    tracking_uri: str
    """Such as `https://mlflow.example.org` or `sqlite:////shared/mlflow.db`."""
    experiment: str
    name: str = ""
    """Shown for the run; empty: that of the output folder."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("tracking_uri", "experiment"):
            if not getattr(self, name):
                raise ValueError(f"logging.mlflow.{name}: empty; give it a value, or take logging.mlflow out")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides the terminal and metrics.jsonl."""

    tensorboard: bool = True
    """Write event files into the output folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases, if it is to be used."""
    mlflow: MlflowConfig | None = None
    """MLflow, if it is to be used."""
    peak_tflops: float = 0.0
    """Dense bf16 products of one device, 1e12 FLOP/s, for the MFU; 0: by the GPU's name, and no MFU on a CPU."""
    price_per_gpu_hour: float = 0.0
    """In any currency; 0 where nothing is to be said of cost."""
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    """What is drawn at validations."""
    monitors: tuple[MonitorName, ...] = (
        "step_times",
        "output_norm",
        "block_norms",
        "attention_logits",
        "gradient_norms",
        "update_ratios",
        "picture_codes",
    )
    """What is measured inside the step: `step_times` and `output_norm` at each, the others every `monitor_every`."""
    monitor_every: int = 100
    """Steps between measurements of the dearer monitors, which make such a step longer by about an eighth on a CPU."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        self.drawing.validate()
        for service in (self.wandb, self.mlflow):
            if service is not None:
                service.validate()
        for name in ("peak_tflops", "price_per_gpu_hour"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"logging.{name}: {getattr(self, name)} must be a number, 0 or more")
        if self.monitor_every < 1:
            raise ValueError(
                f"logging.monitor_every: {self.monitor_every} must be at least 1; to measure nothing, set "
                "logging.monitors=[]"
            )
        if len(set(self.monitors)) < len(self.monitors):
            raise ValueError(f"logging.monitors: {', '.join(self.monitors)} names one twice; name it once")
