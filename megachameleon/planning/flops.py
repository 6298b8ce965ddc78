"""Floating-point operations of training, by several published definitions.

A product of [m, k] and [k, n] counts 2 m n k. Backward counts twice forward.
"""

from dataclasses import dataclass
from typing import Literal

from megachameleon.planning.shapes import TransformerShape

Convention = Literal["causal", "full", "recomputed"]
"""Which work counts. `causal`: the visible half of attention (NeMo, Megatron-Bridge; our `mfu_causal`). `full`: all of
attention (Korthikanti et al.; Megatron-LM's README for 0.8). `recomputed`: the same and a second forward pass of all
layers (Narayanan et al. 2021, section 3.6)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopParts:
    """FLOPs of one token, forward and backward, without anything computed twice."""

    matrices: float
    """Matrices of layers."""
    attention: float
    """Scores and weighted sums over the whole sequence."""
    head: float
    """The output matrix."""

    def total(self, convention: Convention = "causal") -> float:
        """FLOPs of one token."""
        layers = self.matrices + self.attention * (0.5 if convention == "causal" else 1.0)
        # Forward is one part of three, so a second one adds a third; the head is not computed again.
        return self.head + layers * (4 / 3 if convention == "recomputed" else 1.0)


def flops_of(shape: TransformerShape) -> FlopParts:
    """6 for each matrix parameter and token, and 12 x layers x sequence length x hidden for all of attention.

    The embedding is a look-up and counts nothing (Kaplan et al., arXiv 2001.08361, section 2.1; Korthikanti et al.,
    arXiv 2205.05198, appendix A).
    """
    return FlopParts(
        matrices=6.0 * shape.num_layers * shape.layer_matrix_parameters,
        attention=12.0 * shape.num_layers * shape.sequence_length * shape.hidden_size,
        head=6.0 * shape.head_parameters,
    )
