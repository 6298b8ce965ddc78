"""How a careful person trains a plain torch module: fused AdamW, gradients freed between steps, one clip."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.batches import PeerBatch, peer_batches
from benchmarks.contestants.base import BETAS, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Z_LOSS, Settings


class TorchTraining:
    """A module, its optimizer and its batches; `logits` says how to call the module.

    bf16 comes in variants. With `autocast`, weights, gradients and Adam's moments are fp32 as in megatron-core's mixed
    precision; without it all of them are bf16, which is less work and trains worse. `compiled` is the latter, with
    blocks and loss compiled.
    """

    same_function = True

    def __init__(self, module: nn.Module, settings: Settings, *, variant: str) -> None:
        self.device = settings.context.device
        self.precision, self.autocast, self.compiled = settings.precision, variant == "autocast", variant == "compiled"
        self.cross_entropy = torch.compile(cross_entropy) if self.compiled else cross_entropy
        self.module = module.to(self.device)
        self.batches = peer_batches(settings.samples, self.device, isolate=settings.documents > 1)
        if settings.precision == "bf16" and not self.autocast:
            for parameter in module.parameters():  # buffers keep their precision
                parameter.data = parameter.data.bfloat16()
        matrices = [p for p in module.parameters() if p.dim() > 1 and not getattr(p, "is_norm", False)]
        chosen = set(map(id, matrices))
        vectors = [p for p in module.parameters() if id(p) not in chosen]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    @property
    def arithmetic(self) -> str:
        """How it computes, for the table."""
        compiled = ", torch.compile" if self.compiled else ""
        if self.precision == "fp32":
            return f"fp32{compiled}"
        return f"bf16 {'autocast, fp32 weights' if self.autocast else 'weights, gradients, moments'}{compiled}"

    def logits(self, batch: PeerBatch) -> Tensor:
        """[b, s, vocab]."""
        raise NotImplementedError

    def step(self, number: int) -> float:
        """See `Contestant.step`. On the CPU our function mode, which a peer would not have, is switched off."""
        with torch._C.DisableTorchFunction():
            batch = self.batches[number % len(self.batches)]
            with self._autocast():
                nll, log_z = self.cross_entropy(self.logits(batch), batch.labels)
                count = batch.loss_mask.sum()
                loss = ((nll + Z_LOSS * log_z.square()) * batch.loss_mask).sum() / count
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return float((nll.detach() * batch.loss_mask).sum() / count)

    def _autocast(self) -> Any:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log Z, fp32 [b, s] each, of logits [b, s, vocab].

    One F.cross_entropy serves both, for log Z is the label's logit more. On one CPU core, 1,024 x 65,536 bf16 logits,
    forward and backward: 0.92 s, against 1.16 s with one log-sum-exp instead.
    """
    wide = logits.float()
    nll = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll, nll + wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
