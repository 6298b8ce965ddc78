"""The whole run in one value."""

from dataclasses import dataclass, field

from megachameleon.config.checkpoint import CheckpointConfig
from megachameleon.config.data import DataConfig
from megachameleon.config.faults import FaultsConfig
from megachameleon.config.health import HealthConfig
from megachameleon.config.kernels import KernelsConfig
from megachameleon.config.logging import LoggingConfig
from megachameleon.config.model import ModelConfig
from megachameleon.config.parallel import ParallelConfig
from megachameleon.config.training import OptimizerConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that determines a run; saved resolved with every checkpoint."""

    output_dir: str = "runs/default"
    """Folder of checkpoints, metrics and pictures."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self) -> None:
        """Check every field and the fields against each other, before anything is built.

        Raises:
            ValueError: names the field, its value and what would work.
        """
        self.model.validate()
        self.data.validate()
        self.parallel.validate(self.model, self.data.sequence_length)
        self.optimizer.validate()
        self.training.validate()
        self.checkpoint.validate()
        self.faults.validate()
        self.health.validate()
        self.logging.validate()
        self._validate_kernels()
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length} is longer than model.context_length="
                f"{self.model.context_length}; shorten it or raise the context"
            )
        if self.optimizer.warmup_steps >= self.training.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} leaves nothing of training.num_steps="
                f"{self.training.num_steps}; take at most {max(self.training.num_steps - 1, 0)}"
            )

    def _validate_kernels(self) -> None:
        self.kernels.validate(self.model, self.parallel)
        # `auto` is checked once the hardware is known.
        if self.training.precision == "fp32":
            self.kernels.require_bf16()
        fp8 = self.kernels.fp8
        if fp8.startswith("te_"):
            shared = self.parallel.context_parallel
            shared *= self.parallel.tensor_parallel if self.parallel.sequence_parallel else 1
            rows = self.data.sequence_length * self.training.micro_batch_size // shared
            # Transformer Engine's FP8 products: rows in eights, sides in sixteens (see KernelsConfig).
            if rows % 8:
                raise ValueError(
                    f"kernels.fp8: {fp8} multiplies 8 n rows only, and data.sequence_length x "
                    f"training.micro_batch_size leaves {rows} on a rank; make that a multiple of 8, or set "
                    "kernels.fp8=none"
                )
        if (fp8.startswith("te_") or self.kernels.userbuffers) and self.logging.drawing.prompts:
            name, value = ("userbuffers", "true") if self.kernels.userbuffers else ("fp8", fp8)
            raise ValueError(
                f"kernels.{name}: {value} is made for the rows of a training step, and drawings take one at a time; "
                "remove logging.drawing.prompts and draw from checkpoints"
            )

    def validate_world(self, world_size: int) -> None:
        """Check that the layout and the batch divide over `world_size` processes.

        Raises:
            ValueError: names the field, its value and what would work.
        """
        micro_batches = self.training.num_micro_batches(self.parallel.data_parallel(world_size))
        self.parallel.require_full_pipeline(micro_batches, self.training.global_batch_size)
