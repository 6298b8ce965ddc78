"""Picks a backend for each operation and says which and why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megachameleon.config import KernelsConfig
from megachameleon.config.training import Backend
from megachameleon.model.kernels import native, reference

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
LayerNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
CrossEntropy = Callable[[Tensor, Tensor, torch.distributed.ProcessGroup], tuple[Tensor, Tensor]]

BACKENDS = {"reference": reference, "torch": native}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The chosen implementation of each operation; signatures as in `reference`."""

    rms_norm: RMSNorm
    qk_layer_norm: LayerNorm
    qk_rms_norm: RMSNorm
    attention: Attention
    cross_entropy: CrossEntropy
    resolved: KernelsConfig
    """The configuration with every `auto` replaced by its choice."""


def choose_kernels(config: KernelsConfig) -> Kernels:
    """Resolve `auto`: torch's kernels run everywhere and are never slower than the plain ones."""

    def resolve(backend: Backend) -> Backend:
        return "torch" if backend == "auto" else backend

    resolved = KernelsConfig(
        norm=resolve(config.norm),
        qk_norm=resolve(config.qk_norm),
        attention=resolve(config.attention),
        loss=resolve(config.loss),
        optimizer=resolve(config.optimizer),
    )
    return Kernels(
        rms_norm=BACKENDS[resolved.norm].rms_norm,
        qk_layer_norm=BACKENDS[resolved.qk_norm].layer_norm,
        qk_rms_norm=BACKENDS[resolved.qk_norm].rms_norm,
        attention=BACKENDS[resolved.attention].attention,
        cross_entropy=BACKENDS[resolved.loss].cross_entropy,
        resolved=resolved,
    )


def describe_kernels(asked: KernelsConfig, chosen: Kernels, device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (operation, backend, what it is) for the table printed at the start of a run."""
    attention = "SDPA by document, no mask" if device.type == "cpu" else "SDPA with a document mask"
    what = {
        "norm": {"torch": "F.rms_norm", "reference": "plain RMSNorm"},
        "qk_norm": {"torch": "F.layer_norm / F.rms_norm", "reference": "plain norm"},
        "attention": {"torch": attention, "reference": "plain softmax(QK)V with a full mask"},
        "loss": {"torch": "one-softmax cross entropy + log Z", "reference": "autograd cross entropy + log Z"},
        "optimizer": {"torch": "fused AdamW", "reference": "AdamW, one parameter at a time"},
    }
    rows = []
    for name, descriptions in what.items():
        backend = getattr(chosen.resolved, name)
        how = "chosen" if getattr(asked, name) == "auto" else "forced"
        rows.append((name, f"{backend} ({how})", descriptions[backend]))
    rows.append(("rotary", "megatron-core", "apply_rotary_pos_emb, unfused"))
    rows.append(("linear, SwiGLU", "megatron-core", "Column/RowParallelLinear, MLP, unfused"))
    return rows
