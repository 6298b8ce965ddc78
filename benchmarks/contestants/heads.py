"""The heads that `benchmarks.head` compares, on the same hidden states, weight and labels."""

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megachameleon.model.head import LossHead, Targets
from megachameleon.model.kernels import chunked_head
from megachameleon.parallel.context import ParallelContext

Z_LOSS = 1e-5
SEED = 1234


class Head:
    """megatron-core's output layer with its cross entropy, as its GPTModel runs them."""

    def __init__(self, layer: ColumnParallelLinear, hidden: Tensor, targets: Targets) -> None:
        self.layer, self.hidden, self.targets = layer, hidden, targets
        layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
        layer.weight.grad_added_to_main_grad = False

    def loss(self) -> Tensor:
        """Summed over tokens."""
        logits, _ = self.layer(self.hidden)
        z_loss = self.z_loss(logits)
        labels = self.targets.labels.transpose(0, 1).contiguous()
        return vocab_parallel_cross_entropy(logits, labels).sum() + z_loss

    def z_loss(self, logits: Tensor) -> Tensor | float:
        """None here."""
        return 0.0

    def step(self, number: int) -> float:
        """Forward and backward, with what the hook of DistributedDataParallel does; the mean loss."""
        weight = self.layer.weight
        self.hidden.grad = None
        loss = self.loss()
        loss.backward()
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad, weight.grad_added_to_main_grad = None, False
        return float(loss.detach()) / self.hidden.size(0)

    def gradient_norms(self) -> tuple[float, float]:
        """Of hidden states and weight."""
        assert self.hidden.grad is not None
        return float(self.hidden.grad.float().norm()), float(self.layer.weight.main_grad.norm())


class HeadWithZLoss(Head):
    """The same with a z-loss computed beside it."""

    def z_loss(self, logits: Tensor) -> Tensor:
        """From a logsumexp of its own, on a copy: megatron-core's cross entropy writes over fp32 logits."""
        return self.targets.z_loss * logits.to(torch.float32, copy=True).logsumexp(-1).square().sum()


class OurHead(Head):
    """Ours, as the decoder calls it."""

    def loss(self) -> Tensor:
        """Summed over tokens."""
        sums: Tensor = self.layer(self.hidden, targets=self.targets)
        return sums[0]


def build_head(name: str, sizes: Any, context: ParallelContext) -> Head:
    """Build one.

    Args:
        sizes: with tokens, hidden, vocab and precision.
    """
    dtype = torch.bfloat16 if sizes.precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=1,
        params_dtype=dtype,
        use_cpu_initialization=context.device.type == "cpu",
    )
    with context.device:
        layer = ColumnParallelLinear(
            sizes.hidden, sizes.vocab, config=config, init_method=_normal, bias=False, tp_group=context.groups.tp
        )
        generator = torch.Generator(context.device).manual_seed(SEED)
        hidden = torch.randn(sizes.tokens, 1, sizes.hidden, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(0, sizes.vocab, (1, sizes.tokens), generator=generator)
        weights, is_image = torch.ones(labels.shape), labels < sizes.vocab // 8
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.02)
    targets = Targets(labels=labels, weights=weights, is_image=is_image, z_loss=Z_LOSS)
    if name == "ours":
        return OurHead(LossHead.instead_of(layer, chunked_head.ChunkedHead()), hidden, targets)
    return (HeadWithZLoss if name == "megatron-z" else Head)(layer, hidden, targets)


def _normal(weight: Tensor) -> Tensor:
    return weight
