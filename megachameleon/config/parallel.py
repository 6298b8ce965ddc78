"""How the work is divided over devices."""

import math
from dataclasses import dataclass
from typing import Literal

from megachameleon.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the parallel axes. The data-parallel size is what remains of the world."""

    tensor_parallel: int = 1
    """Devices that share each matrix."""
    pipeline_parallel: int = 1
    """Stages that the layers are divided into."""
    virtual_pipeline_parallel: int = 1
    """Chunks of layers that each pipeline stage holds, in megatron-core's interleaved schedule: a smaller bubble for
    more transfers. Needs pipeline_parallel of 2 or more, and micro-batches that pipeline_parallel divides."""
    context_parallel: int = 1
    """Devices that share each sequence: each holds two of 2 x context_parallel equal pieces, one from the front and
    one from the back, so that causal attention costs all the same."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence."""
    distributed_optimizer: bool = False
    """Split optimizer states over data- and context-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over replicas while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Collect updated weights while the next forward pass already runs. Needs distributed_optimizer and
    overlap_grad_reduce."""
    bucket_size: int | None = None
    """Parameters that travel together when communication overlaps; None takes megatron-core's rule, the larger of
    40 million and 1 million x replicas."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those of `recompute_modules`, or whole blocks.
    """
    recompute_modules: tuple[Literal["layernorm", "mlp"], ...] = ("layernorm", "mlp")
    """What `selective` drops. `layernorm`: outputs of the norms before the branches, nearly free (Swin order has none
    there). `mlp`: everything inside the feed-forward, about half of what a block keeps. Attention is not in the list:
    its kernels keep no scores anyway."""

    @property
    def model_parallel(self) -> int:
        """Devices that hold one copy of the model and read the same samples."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def data_parallel(self, world_size: int) -> int:
        """Number of groups of devices that read different samples in a world.

        Raises:
            ValueError: the world is not a multiple of the devices that one copy needs.
        """
        if world_size % self.model_parallel:
            raise ValueError(
                f"parallel: tensor_parallel={self.tensor_parallel} x pipeline_parallel={self.pipeline_parallel} "
                f"x context_parallel={self.context_parallel} = {self.model_parallel} does not divide the "
                f"{world_size} processes; start a multiple of {self.model_parallel}"
            )
        return world_size // self.model_parallel

    def describe(self, world_size: int) -> str:
        """The axes in words, for people."""
        chunks, context = self.virtual_pipeline_parallel, self.context_parallel
        parts = [
            f"tensor {self.tensor_parallel}",
            f"pipeline {self.pipeline_parallel}" + (f" ({chunks} chunks each)" if chunks > 1 else ""),
            *([f"context {context}"] if context > 1 else []),
            f"data {self.data_parallel(world_size)}",
        ]
        return " x ".join(parts)

    def validate(self, model: ModelConfig, sequence_length: int) -> None:
        """Raise ValueError for a layout that does not divide, with the numbers that would."""
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "context_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: {getattr(self, name)} must be at least 1")
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
            _require_splits("tensor_parallel", self.tensor_parallel, f"model.{name}", getattr(model, name))
        self._validate_pipeline(model)
        self._validate_sequence(sequence_length)
        self._validate_overlap()
        self._validate_recompute(model)

    def require_full_pipeline(self, num_micro_batches: int, global_batch_size: int) -> None:
        """Refuse a number of micro-batches that the interleaved schedule cannot run.

        Raises:
            ValueError: names the global batch sizes that would work.
        """
        if self.virtual_pipeline_parallel == 1 or num_micro_batches % self.pipeline_parallel == 0:
            return
        # The global batch grows by this for each further round of the pipeline.
        unit = global_batch_size // num_micro_batches * self.pipeline_parallel
        raise ValueError(
            f"parallel.virtual_pipeline_parallel: {self.virtual_pipeline_parallel} needs micro-batches in multiples of "
            f"pipeline_parallel={self.pipeline_parallel}, but training.global_batch_size={global_batch_size} makes "
            f"{num_micro_batches} on each rank; {_multiples_around(global_batch_size, unit)} would work"
        )

    def _validate_pipeline(self, model: ModelConfig) -> None:
        stages, chunks = self.pipeline_parallel, self.virtual_pipeline_parallel
        _require_splits("pipeline_parallel", stages, "model.num_layers", model.num_layers)
        if chunks > 1 and stages == 1:
            raise ValueError(
                f"parallel.virtual_pipeline_parallel: {chunks} needs pipeline_parallel of 2 or more; set it to 1"
            )
        _require_splits(
            "virtual_pipeline_parallel", chunks, "layers of a stage (model.num_layers / pipeline_parallel)",
            model.num_layers // stages,
        )  # fmt: skip

    def _validate_sequence(self, sequence_length: int) -> None:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("parallel.sequence_parallel: needs tensor_parallel of 2 or more; set it to false")
        # A context rank holds two equal pieces, and tensor ranks divide what it holds.
        context, tensor = self.context_parallel, self.tensor_parallel if self.sequence_parallel else 1
        unit = tensor if context == 1 else context * math.lcm(2, tensor)
        if sequence_length % unit:
            reason = "2 x context_parallel" if tensor == 1 else "context_parallel x lcm(2, tensor_parallel)"
            raise ValueError(
                f"data.sequence_length: {sequence_length} does not divide into {unit} equal pieces, which "
                f"parallel.context_parallel={context} and tensor_parallel={self.tensor_parallel} "
                f"({'with' if self.sequence_parallel else 'without'} sequence_parallel) need"
                f"{f' ({reason})' if context > 1 else ''}; {_multiples_around(sequence_length, unit)} would work"
            )

    def _validate_overlap(self) -> None:
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "parallel.overlap_param_gather: needs distributed_optimizer and overlap_grad_reduce; set both to true"
            )
        if self.bucket_size is not None and self.bucket_size < 1:
            raise ValueError(f"parallel.bucket_size: {self.bucket_size} must be at least 1")

    def _validate_recompute(self, model: ModelConfig) -> None:
        if self.recompute != "selective":
            return
        # Swin order has no norm before a branch whose output could be dropped.
        useful = {"layernorm", "mlp"} if model.norm_order == "pre" else {"mlp"}
        if not useful & set(self.recompute_modules):
            raise ValueError(
                f"parallel.recompute_modules: {list(self.recompute_modules)} leaves nothing to recompute with "
                f"model.norm_order={model.norm_order}; name one of {', '.join(sorted(useful))}"
            )


def _require_splits(axis: str, parts: int, what: str, value: int) -> None:
    if value % parts:
        works = [n for n in range(1, min(value, 128) + 1) if value % n == 0]
        raise ValueError(
            f"parallel.{axis}: {parts} does not divide {what}={value}; sizes that do: {', '.join(map(str, works))}"
        )


def _multiples_around(value: int, unit: int) -> str:
    low = value // unit * unit
    return f"{low} or {low + unit}" if low else str(unit)
