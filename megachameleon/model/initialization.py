"""Initial weights as a function of (seed, parameter name): the same model at every parallel layout.

Matrices are normal with `init_std`; the output projections of each block are divided by sqrt(2 * num_layers)
(GPT-2's rule) when `depth_scaled_init` is set. Norm weights are 1 and biases 0. Each rank draws the whole matrix and
keeps its part, so drawing costs time on large models but never depends on the layout.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megachameleon.config import ModelConfig

OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def initialize(model: nn.Module, config: ModelConfig, seed: int, *, tensor_rank: int, tensor_parallel: int) -> None:
    """Fill every matrix of `model` in place."""
    with torch.no_grad():
        for name, parameter in global_names(model):
            if parameter.dim() < 2:
                continue
            std = config.init_std
            if config.depth_scaled_init and name.endswith(OUTPUT_PROJECTIONS):
                std /= math.sqrt(2 * config.num_layers)
            shape = list(parameter.shape)
            if tensor_parallel > 1:
                shape[partition_dim(parameter)] *= tensor_parallel
            full = torch.randn(shape, generator=_generator(seed, name)).mul_(std)
            parameter.copy_(slice_for_rank(full, name, parameter, tensor_rank, tensor_parallel))


def global_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with the names they have in a model that is not split into pipeline stages."""
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    # megatron-core counts layers from 1, over all stages; modules of a stage count from 0.
    numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(layers)}
    for name, parameter in model.named_parameters():
        yield re.sub(r"(?<=decoder\.layers\.)\d+", lambda match: numbers[match[0]], name), parameter


def partition_dim(parameter: Tensor) -> int:
    """The dim along which megatron-core splits a matrix over tensor-parallel ranks."""
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def slice_for_rank(full: Tensor, name: str, parameter: Tensor, tensor_rank: int, tensor_parallel: int) -> Tensor:
    """The part of a whole parameter that one tensor-parallel rank holds.

    The two halves of SwiGLU's input projection are split separately, since each rank holds a part of both.
    """
    if tensor_parallel == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim = partition_dim(parameter)
    halves = full.chunk(2, dim) if "linear_fc1" in name else (full,)
    return torch.cat([half.chunk(tensor_parallel, dim)[tensor_rank] for half in halves], dim)


def _generator(seed: int, name: str) -> torch.Generator:
    # A hash, not arithmetic: torch's CPU generator looks at no more than 32 bits of its seed.
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=6).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
