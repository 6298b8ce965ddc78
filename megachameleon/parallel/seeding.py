"""Random numbers as a function of (seed, step, place): nothing to save, and a resumed run draws the same ones.

Dropout in regions that are replicated over tensor-parallel ranks must agree on them; in regions that are split it
must differ. megatron-core keeps one generator for each and switches between them; here both are seeded anew at each
step. Data- and context-parallel ranks and pipeline stages hold different activations and get different seeds.
"""

import hashlib

import torch

from megachameleon.parallel.context import ParallelContext


def derive_seed(*parts: int | str) -> int:
    """A 48-bit seed from a tuple of numbers and names."""
    text = "/".join(map(str, parts))
    # A hash, not arithmetic: torch's CPU generator looks at no more than 32 bits of its seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def seed_step(seed: int, step: int, context: ParallelContext) -> None:
    """Seed all generators of this process for one training step."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # No tensor rank here: megatron-core adds it itself, to the seed of split regions only.
    place = (context.pipeline_rank, context.data_rank, context.context_rank)
    step_seed = derive_seed(seed, "step", step, *place)
    model_parallel_cuda_manual_seed(step_seed)
    torch.manual_seed(step_seed)
