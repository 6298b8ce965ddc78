"""Which Adam megatron-core builds. By itself it takes Transformer Engine's, else apex's, wherever one is importable."""

from typing import Any

import torch


def use_adam(backend: str) -> None:
    """Let megatron-core build, save and load the Adam of `backend`: reference or torch, apex, transformer_engine.

    It decides at import, by names in two of its modules; this decides again.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    is_torch = backend in ("reference", "torch")
    adam = torch.optim.AdamW if is_torch else _fused_adam(backend)
    optimizer.Adam = distrib_optimizer.Adam = adam
    optimizer.USING_PYTORCH_OPTIMIZER = is_torch
    distrib_optimizer.HAVE_APEX_OR_TE = not is_torch
    distrib_optimizer.USING_APEX_OPTIMIZER = backend == "apex"
    distrib_optimizer.USING_TE_OPTIMIZER = backend == "transformer_engine"


def _fused_adam(backend: str) -> Any:
    if backend == "apex":
        from apex.optimizers import FusedAdam
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam
    return FusedAdam
