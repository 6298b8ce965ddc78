"""Copies of a model that read different data: their gradients are summed, their weights kept equal.

A process holds a list of model chunks: one, or several under the interleaved pipeline schedule.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megachameleon.config import ParallelConfig

Chunks = list[torch.nn.Module]


def wrap_replicas(decoders: Sequence[torch.nn.Module], config: ParallelConfig) -> Chunks:
    """Wrap model chunks so that gradients are summed in fp32 over all ranks that read other data.

    A bf16 model is first wrapped to cast its inputs and outputs, as megatron-core expects.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    interleaved = len(decoders) > 1
    replica_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        # In the interleaved schedule all stages communicate at the same time; else each when it is ready.
        align_param_gather=config.overlap_param_gather and interleaved,
        bucket_size=config.bucket_size,
        check_for_nan_in_grad=False,  # the training step checks the loss and the gradient norm
    )
    chunks: Chunks = []
    for number, decoder in enumerate(decoders):
        transformer_config: Any = decoder.config
        # fp32 needs no casts at the edges of a stage.
        inner = Float16Module(transformer_config, decoder) if transformer_config.bf16 else decoder
        # Only the first chunk's communication is on the critical path: the others go in one piece.
        replica = DistributedDataParallel(transformer_config, replica_config, inner, disable_bucketing=number > 0)
        chunks.append(replica)
    _tell_schedule(chunks, config)
    return chunks


def gather_parameters(chunks: Sequence[torch.nn.Module], config: ParallelConfig) -> None:
    """Make sure that every weight is here and up to date, before they are read outside of a training step.

    With `overlap_param_gather`, the update leaves each rank with its own part, and the next step collects the rest.
    """
    if config.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def _tell_schedule(chunks: Chunks, config: ParallelConfig) -> None:
    """Put into megatron-core's configuration what its schedules call between forward and backward passes."""

    def each(method: str) -> Any:
        functions = [getattr(chunk, method) for chunk in chunks]
        return functions if len(functions) > 1 else functions[0]

    for chunk in chunks:
        transformer_config: Any = chunk.config
        transformer_config.finalize_model_grads_func = finalize_gradients
        if config.overlap_grad_reduce:
            transformer_config.no_sync_func = each("no_sync")
            if len(chunks) > 1:
                transformer_config.grad_sync_func = each("start_grad_sync")
        if config.overlap_param_gather and len(chunks) > 1:
            transformer_config.param_sync_func = each("start_param_sync")


def finalize_gradients(
    chunks: Chunks, num_tokens: torch.Tensor | None = None, pg_collection: Any = None, **arguments: Any
) -> None:
    """megatron-core's sum over replicas. The update divides by the number of tokens, in a pass that it makes anyway.

    megatron-core's own division passes over all gradients once more, and asks the host whether there are any tokens.
    """
    from megatron.core.distributed import finalize_model_grads

    # None in place of the number of tokens: without one it does not divide.
    finalize_model_grads(chunks, None, pg_collection=pg_collection, **arguments)
