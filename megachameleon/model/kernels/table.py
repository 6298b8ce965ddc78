"""Picks a backend for each operation and says which and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megachameleon.config import KernelsConfig
from megachameleon.config.training import Backend
from megachameleon.model.head import HeadLoss
from megachameleon.model.kernels import chunked_head, native, reference
from megachameleon.model.sequence_layout import SequenceLayout

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
HeadNorm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]
SwiGLU = Callable[[Tensor], Tensor]

BACKENDS = {"reference": reference, "torch": native}
HEADS = {"reference": reference, "torch": chunked_head}


class Attention(Protocol):
    """Makes a plan for each micro-batch, and follows it in every layer. See `reference.Attention`."""

    def plan(self, layout: SequenceLayout) -> Any:
        """What the layers of a micro-batch share."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        """Attend."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The chosen implementation of each operation; signatures as in `reference`."""

    rms_norm: RMSNorm
    head_norm: HeadNorm
    rotary: Rotary
    attention: Attention
    swiglu: SwiGLU
    head_loss: HeadLoss
    resolved: KernelsConfig
    """The configuration with every `auto` replaced by its choice."""


def choose_kernels(config: KernelsConfig) -> Kernels:
    """Resolve `auto`: torch's kernels run everywhere and are never slower than the plain ones."""

    def resolve(backend: Backend) -> Backend:
        return "torch" if backend == "auto" else backend

    resolved = KernelsConfig(
        norm=resolve(config.norm),
        qk_norm=resolve(config.qk_norm),
        rotary=resolve(config.rotary),
        attention=resolve(config.attention),
        swiglu=resolve(config.swiglu),
        loss=resolve(config.loss),
        optimizer=resolve(config.optimizer),
    )
    return Kernels(
        rms_norm=BACKENDS[resolved.norm].rms_norm,
        head_norm=BACKENDS[resolved.qk_norm].head_norm,
        rotary=BACKENDS[resolved.rotary].rotary,
        attention=BACKENDS[resolved.attention].Attention(),
        swiglu=BACKENDS[resolved.swiglu].swiglu,
        head_loss=HEADS[resolved.loss].head_loss,
        resolved=resolved,
    )


def describe_kernels(asked: KernelsConfig, chosen: Kernels, device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (operation, backend, what it is) for the table printed at the start of a run."""
    attention = (
        "flash by document, no mask" if device.type == "cpu" else "SDPA (cuDNN, flash), FlexAttention for documents"
    )
    what = {
        "norm": {"torch": "RMSNorm that keeps its input only", "reference": "plain RMSNorm"},
        "qk_norm": {"torch": "F.layer_norm, or one affine a head", "reference": "plain norm"},
        "rotary": {"torch": "in place, tables once a micro-batch", "reference": "plain rotation"},
        "attention": {"torch": attention, "reference": "plain softmax(QK)V with a full mask"},
        "swiglu": {"torch": "keeps its input only", "reference": "silu(gate) * up"},
        "loss": {"torch": "head, cross entropy and z-loss by chunks", "reference": "head, then cross entropy + log Z"},
        "optimizer": {"torch": "fused AdamW", "reference": "AdamW, one parameter at a time"},
    }
    rows = []
    for name, descriptions in what.items():
        backend = getattr(chosen.resolved, name)
        how = "chosen" if getattr(asked, name) == "auto" else "forced"
        rows.append((name, f"{backend} ({how})", descriptions[backend]))
    rows.append(("linear", "megatron-core", "Column/RowParallelLinear"))
    return rows
