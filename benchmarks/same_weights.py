"""One set of weights for all contestants, drawn by name, and the check that they then compute the same loss."""

import math

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from megachameleon.parallel.seeding import derive_seed

STD = 0.02
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of the first loss, nats per token, between contestants that compute the same function."""


class Weights:
    """Tensors by name, each drawn anew when it is asked for: no copy of the model is kept.

    Names: `embedding` and `head` [vocab, hidden], `norm` [hidden]; for each layer i `i.q`, `i.k`, `i.v`, `i.o`,
    `i.gate`, `i.up`, `i.down` [out, in], `i.attention_norm`, `i.mlp_norm` [hidden], `i.q_norm`, `i.k_norm`,
    `i.q_norm_bias`, `i.k_norm_bias` [head_dim].
    """

    def __init__(self, shape: Shape, seed: int, device: torch.device) -> None:
        self.shape, self.seed, self.device = shape, seed, device

    def __getitem__(self, name: str) -> Tensor:
        """fp32; matrices are normal with std 0.02, norms scatter around 1 and 0, so that a swap of two shows."""
        kind = name.rpartition(".")[2]
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, name))
        noise = torch.randn(self._size(kind), generator=generator, device=self.device)
        if kind.endswith("bias"):
            return noise * 0.1
        if kind.endswith("norm"):
            return 1 + noise * 0.1
        # GPT-2's scaling of what is added to the residual stream
        return noise * (STD / math.sqrt(2 * self.shape.layers) if kind in ("o", "down") else STD)

    def _size(self, kind: str) -> tuple[int, ...]:
        s = self.shape
        key_value = s.kv_groups * s.head_dim
        matrices = {
            "embedding": (s.vocab, s.hidden),
            "head": (s.vocab, s.hidden),
            "q": (s.hidden, s.hidden),
            "k": (key_value, s.hidden),
            "v": (key_value, s.hidden),
            "o": (s.hidden, s.hidden),
            "gate": (s.ffn, s.hidden),
            "up": (s.ffn, s.hidden),
            "down": (s.hidden, s.ffn),
        }
        if kind in matrices:
            return matrices[kind]
        return (s.head_dim,) if kind.startswith(("q_norm", "k_norm")) else (s.hidden,)


def require_same_loss(losses: dict[str, float], precision: str) -> None:
    """Refuse to compare contestants that do not compute the same function.

    Args:
        losses: first loss of each contestant that should agree, nats per token.

    Raises:
        ValueError: two of them differ by more than `TOLERANCE`.
    """
    if len(losses) < 2:
        return
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    # `not <=` and not `>`, so that NaN is refused
    if not losses[high] - losses[low] <= TOLERANCE[precision]:
        raise ValueError(
            f"first loss: {low} computes {losses[low]:.6f} and {high} {losses[high]:.6f} from the same weights and "
            f"batch, more than {TOLERANCE[precision]:g} apart in {precision}; they are not the same model, so their "
            "times say nothing (--no-check to measure nevertheless)"
        )
