"""The same decoder in plain PyTorch, as one would write it by hand: SDPA, nn.RMSNorm, a matrix for each projection.

Joint matrices for queries, keys and values and for gate and up were slower on the CPU, for their outputs are strided.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.batches import PeerBatch
from benchmarks.contestants.base import Settings
from benchmarks.contestants.torch_training import TorchTraining
from benchmarks.same_weights import Weights
from benchmarks.shapes import Shape


class Attention(nn.Module):
    """Grouped-query attention with LayerNorm on queries and keys before rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim, self.grouped = shape.head_dim, shape.heads != shape.kv_groups
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_groups * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_groups * shape.head_dim, bias=False)
        self.q_norm = nn.LayerNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.LayerNorm(shape.head_dim, eps=shape.norm_eps)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """x [b, s, hidden]; cos and sin [s, head_dim]; visible [b, 1, s, s] or None."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=self.grouped
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, then SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """[b, s, hidden] to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin, visible)
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainDecoder(nn.Module):
    """Token ids [b, s] to logits [b, s, vocab]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.sequence_length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """visible: bool [b, 1, s, s], or None for causality."""
        x = self.embedding(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        return self.head(self.norm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [b, heads, s, head_dim], halves paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Plain(TorchTraining):
    """See the module."""

    module: PlainDecoder

    @property
    def title(self) -> str:
        """For the table."""
        return f"plain PyTorch {torch.__version__}, {self.arithmetic}"

    def logits(self, batch: PeerBatch) -> Tensor:
        """See `TorchTraining.logits`."""
        return self.module(batch.tokens, batch.visible)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """See `Contestant.load`."""
        self.module.embedding.weight.copy_(weights["embedding"])
        self.module.norm.weight.copy_(weights["norm"])
        self.module.head.weight.copy_(weights["head"])
        for i, block in enumerate(self.module.blocks):
            assert isinstance(block, Block)
            block.attention_norm.weight.copy_(weights[f"{i}.attention_norm"])
            for name in "qkv":
                getattr(block.attention, name).weight.copy_(weights[f"{i}.{name}"])
            block.attention.out.weight.copy_(weights[f"{i}.o"])
            for name, norm in (("q_norm", block.attention.q_norm), ("k_norm", block.attention.k_norm)):
                norm.weight.copy_(weights[f"{i}.{name}"])
                norm.bias.copy_(weights[f"{i}.{name}_bias"])
            block.mlp_norm.weight.copy_(weights[f"{i}.mlp_norm"])
            for name in ("gate", "up", "down"):
                getattr(block, name).weight.copy_(weights[f"{i}.{name}"])


def build(settings: Settings, *, variant: str) -> Plain:
    """The contestant."""
    module = PlainDecoder(settings.shape)
    if variant == "compiled":
        for block in module.blocks:
            block.compile()
    return Plain(module, settings, variant=variant)
