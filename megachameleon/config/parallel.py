"""How the work is divided over devices."""

from dataclasses import dataclass

from megachameleon.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the parallel axes. The data-parallel size is what remains of the world."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence."""
    distributed_optimizer: bool = False
    """Split optimizer states over data-parallel ranks."""

    @property
    def model_parallel(self) -> int:
        """Devices that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    def data_parallel(self, world_size: int) -> int:
        """Number of copies of the model in a world.

        Raises:
            ValueError: the world is not a multiple of the devices that one copy needs.
        """
        if world_size % self.model_parallel:
            raise ValueError(
                f"parallel: tensor_parallel={self.tensor_parallel} x pipeline_parallel={self.pipeline_parallel} "
                f"= {self.model_parallel} does not divide the {world_size} processes; "
                f"start a multiple of {self.model_parallel}"
            )
        return world_size // self.model_parallel

    def validate(self, model: ModelConfig, sequence_length: int) -> None:
        """Raise ValueError for a layout that does not divide, with the numbers that would."""
        for name in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: {getattr(self, name)} must be at least 1")
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
            _require_splits("tensor_parallel", self.tensor_parallel, f"model.{name}", getattr(model, name))
        _require_splits("pipeline_parallel", self.pipeline_parallel, "model.num_layers", model.num_layers)
        if self.sequence_parallel:
            if self.tensor_parallel == 1:
                raise ValueError("parallel.sequence_parallel: needs tensor_parallel of 2 or more; set it to false")
            _require_splits("tensor_parallel", self.tensor_parallel, "data.sequence_length", sequence_length)


def _require_splits(axis: str, parts: int, what: str, value: int) -> None:
    if value % parts:
        works = [n for n in range(1, min(value, 128) + 1) if value % n == 0]
        raise ValueError(
            f"parallel.{axis}: {parts} does not divide {what}={value}; sizes that do: {', '.join(map(str, works))}"
        )
