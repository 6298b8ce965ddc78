"""Picks a backend for each operation and says which and why."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from megachameleon.config import KernelsConfig
from megachameleon.config.kernels import OPERATIONS
from megachameleon.model.head import HeadLoss
from megachameleon.model.kernels import chunked_head, native, reference
from megachameleon.model.kernels.linear import Linear, choose_linear
from megachameleon.model.sequence_layout import SequenceLayout
from megachameleon.optional_packages import APEX, LIGER, TRANSFORMER_ENGINE, Package, why_unusable

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
HeadNorm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]
SwiGLU = Callable[[Tensor], Tensor]


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
    """(x, weight, eps) to the norm over the last dim."""
    head_norm: HeadNorm
    """(x, weight, bias or None, eps): QK-norm."""
    rotary: Rotary
    """(x, cosines, sines) to turned queries or keys."""
    attention: Attention
    """Plans a micro-batch, then attends in each layer."""
    swiglu: SwiGLU
    """[..., 2 F] to [..., F]."""
    linear: Linear
    """Modules for the matrices of blocks."""
    head_loss: HeadLoss
    """From hidden states to the sums of `loss_sums`."""
    resolved: KernelsConfig
    """The configuration with every `auto` replaced by its choice."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    what: str
    """For people, in a few words."""
    package: Package | None = None
    """What it needs, besides a CUDA device; None needs neither."""


TABLE: Mapping[str, Mapping[str, Backend]] = {
    "embedding": {
        "reference": Backend("megatron-core's, a dense gradient"),
        "torch": Backend("rows of the gradient added straight to the fp32 sum"),
    },
    "norm": {
        "reference": Backend("plain RMSNorm"),
        "torch": Backend("RMSNorm that keeps its input only"),
        "transformer_engine": Backend("Transformer Engine's RMSNorm", TRANSFORMER_ENGINE),
    },
    "qk_norm": {
        "reference": Backend("plain norm"),
        "torch": Backend("F.layer_norm, or one affine a head"),
        "transformer_engine": Backend("Transformer Engine's; torch's for several groups", TRANSFORMER_ENGINE),
    },
    "rotary": {
        "reference": Backend("plain rotation"),
        "torch": Backend("tables once a micro-batch, nothing kept"),
    },
    "attention": {
        "reference": Backend("plain softmax(QK)V with a full mask"),
        "torch": Backend("flash by document on CPU; on CUDA SDPA (cuDNN, flash), FlexAttention for documents"),
        "transformer_engine": Backend("Transformer Engine's flash or cuDNN attention", TRANSFORMER_ENGINE),
    },
    "swiglu": {
        "reference": Backend("silu(gate) * up"),
        "torch": Backend("keeps its input only"),
        "liger": Backend("one Triton kernel each way", LIGER),
    },
    "linear": {
        "reference": Backend("megatron-core's, weight gradients copied to the fp32 sum"),
        "torch": Backend("weight gradients added straight to the fp32 sum"),
        "apex": Backend("the same by apex's kernel", APEX),
        "transformer_engine": Backend("Transformer Engine's Linear", TRANSFORMER_ENGINE),
    },
    "loss": {
        "reference": Backend("head, then cross entropy + log Z"),
        "torch": Backend("head, cross entropy and z-loss by chunks, gradients at once"),
    },
    "optimizer": {
        "reference": Backend("AdamW, one parameter at a time"),
        "torch": Backend("fused AdamW"),
        "apex": Backend("apex's FusedAdam", APEX),
        "transformer_engine": Backend("Transformer Engine's FusedAdam", TRANSFORMER_ENGINE),
    },
}


def choose_kernels(config: KernelsConfig, device_type: str | None = None) -> Kernels:
    """Resolve `auto` and load what was chosen.

    Args:
        device_type: "cuda" or "cpu"; None is what this machine has.

    Raises:
        ValueError: a forced backend cannot run on this machine.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    resolved = resolve(config, device_type)
    return Kernels(
        rms_norm=_module(resolved.norm).rms_norm,
        head_norm=_module(resolved.qk_norm).head_norm,
        rotary=_module(resolved.rotary).rotary,
        attention=_module(resolved.attention).Attention(),
        swiglu=_module(resolved.swiglu).swiglu,
        linear=choose_linear(resolved),
        head_loss=chunked_head.ChunkedHead() if resolved.loss == "torch" else reference.head_loss,
        resolved=resolved,
    )


def resolve(config: KernelsConfig, device_type: str) -> KernelsConfig:
    """The configuration with `auto` replaced, once every forced choice is known to be possible.

    Raises:
        ValueError: see `choose_kernels`.
    """
    chosen: dict[str, Any] = {}
    for operation in OPERATIONS:
        asked = getattr(config, operation)
        if asked == "auto":
            chosen[operation] = _automatic(operation, device_type)
        else:
            _require(operation, asked, device_type)
    # 8.9 is Ada, the first with FP8 tensor cores.
    if config.fp8 != "none" and device_type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        name = torch.cuda.get_device_name()
        raise ValueError(f"kernels.fp8: {config.fp8} needs a GPU of Ada, Hopper or later, not {name}; set it to none")
    return dataclasses.replace(config, **chosen)


def describe_kernels(asked: KernelsConfig, chosen: Kernels) -> list[tuple[str, str, str]]:
    """Rows (operation, backend, what it is) for the table printed at the start of a run."""
    rows = []
    for operation in OPERATIONS:
        backend = getattr(chosen.resolved, operation)
        how = "chosen" if getattr(asked, operation) == "auto" else "forced"
        rows.append((operation, f"{backend} ({how})", TABLE[operation][backend].what))
    if asked.fp8 != "none":
        rows.append(("fp8", f"{asked.fp8} (forced)", "precision of the blocks' matrix products"))
    if asked.userbuffers:
        rows.append(("userbuffers", "on (forced)", "tensor-parallel communication during matrix products"))
    return rows


def start_kernels(kernels: Kernels, *, num_tokens: int, hidden_size: int, tensor_parallel: int) -> None:
    """Whatever must be there before the first step: communication buffers, if asked for.

    Args:
        num_tokens: positions of a micro-batch that one tensor-parallel group works on.
    """
    if kernels.resolved.userbuffers:
        fp8 = kernels.resolved.fp8 != "none"
        _module("transformer_engine").start_userbuffers(num_tokens, hidden_size, tensor_parallel, fp8=fp8)


def _automatic(operation: str, device_type: str) -> str:
    """torch, but for SwiGLU on CUDA, where Liger's kernel is known to win; docs/decisions.md says why no more."""
    if operation == "swiglu" and device_type == "cuda" and why_unusable(LIGER) is None:
        return "liger"
    return "torch"


def _require(operation: str, backend: str, device_type: str) -> None:
    field = f"kernels.{operation}"
    found = TABLE[operation].get(backend)
    if found is None:
        raise ValueError(f"{field}: {backend!r} is not one of auto, {', '.join(TABLE[operation])}")
    if found.package is None:
        return
    if device_type != "cuda":
        raise ValueError(f"{field}: {backend} needs a CUDA device, and there is none; set {field}=auto")
    if reason := why_unusable(found.package):
        raise ValueError(
            f"{field}: {backend} needs {found.package.name}, which {reason}; "
            f"{found.package.remedy}, or set {field}=auto"
        )


def _module(backend: str) -> Any:
    if backend in ("reference", "torch"):
        return reference if backend == "reference" else native
    # Imported when chosen only: the module needs its package at import.
    return import_module(f"megachameleon.model.kernels.{backend}")
