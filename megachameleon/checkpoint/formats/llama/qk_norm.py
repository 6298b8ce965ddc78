"""A QK-norm that changes a model trained without one as little as it can.

A norm makes all vectors of a head equally long, so no weights make it an identity. The nearest scale is the length that
they have on average. For inputs x of a norm with weight g and uncorrelated dimensions of variance 1, a head W x has the
covariance C = W diag(g^2) W'; its mean square is tr(C) / head_dim. LayerNorm takes the mean over the head's dimensions
away too, so there C is the covariance of what is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from torch import Tensor

QKNorm = Literal["layernorm", "rmsnorm", "none"]


@dataclass(frozen=True, kw_only=True)
class NearIdentity:
    """The norm of the queries or the keys of one layer, and how far from identity it is expected to be."""

    scales: tuple[float, ...]
    """Its weights by group; all dimensions of a head have the same."""
    mean_share: float
    """Of the energy (squared lengths), what stands in the mean over a head's dimensions; LayerNorm takes it away."""
    length_variation: float
    """Standard deviation of a vector's length by its mean, which the norm takes away; half of that of the square."""
    head_variation: float
    """Largest relative distance of a head's own scale from that of its group."""

    @property
    def distortion(self) -> float:
        """Expected relative error of a vector: root of the sum of the three squares, for comparing layers."""
        return math.sqrt(self.mean_share + self.length_variation**2 + self.head_variation**2)

    def in_words(self) -> str:
        """For a note."""
        words = [f"lengths, now alike, varied by {self.length_variation:.1%}"]
        if self.mean_share:
            words.append(f"the mean over a head's dimensions, now gone, had {self.mean_share:.2%} of the energy")
        if self.head_variation > 1e-3:
            words.append(f"a head is up to {self.head_variation:.1%} off its group's scale")
        return ", ".join(words)


def near_identity(weight: Tensor, norm: Tensor, *, heads: int, groups: int, kind: QKNorm) -> NearIdentity:
    """Measure a projection.

    Args:
        weight: of the queries or keys, [heads x head_dim, hidden].
        norm: weight of the RMSNorm before it, [hidden].
        groups: of heads with one scale; divides `heads`.
        kind: `layernorm` or `rmsnorm`.
    """
    # The norm before it scales what the projection sees, so it belongs to the covariance.
    parts = (weight.float() * norm.float()).unflatten(0, (heads, -1))
    width = parts.shape[1]
    covariance = parts @ parts.transpose(1, 2)
    energy = _traces(covariance)
    mean_share = 0.0
    if kind == "layernorm":
        # Centred from both sides: the covariance of vectors from which their mean is taken.
        covariance -= covariance.mean(1, keepdim=True)
        covariance -= covariance.mean(2, keepdim=True)
        mean_share = 1 - (_traces(covariance).sum() / energy.sum().clamp(min=1e-30)).item()
        energy = _traces(covariance)
    squares = covariance.square().sum((1, 2))
    own = (energy / width).unflatten(0, (groups, -1))
    scales = own.mean(1).sqrt()
    apart = (own.sqrt() / scales.clamp(min=1e-30)[:, None] - 1).abs().max().item()
    return NearIdentity(
        scales=tuple(scales.tolist()),
        mean_share=max(mean_share, 0.0),
        length_variation=(2 * squares / energy.square().clamp(min=1e-30)).sqrt().mean().item() / 2,
        head_variation=apart,
    )


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def distortion_notes(layers: Sequence[tuple[NearIdentity, NearIdentity]], kind: QKNorm, groups: int) -> list[str]:
    """What to tell of the norms of queries and keys by layer: on average, and of the worst layer."""
    notes = [
        f"QK-norm ({kind}, {groups} group{'s' if groups > 1 else ''}) was put in as near to identity as it can be; "
        "what it changes all the same, expected from the weights for uncorrelated inputs:"
    ]
    for number, what in enumerate(("queries", "keys")):
        norms = [layer[number] for layer in layers]
        mean = NearIdentity(
            scales=(),
            mean_share=fmean(norm.mean_share for norm in norms),
            length_variation=fmean(norm.length_variation for norm in norms),
            head_variation=max(norm.head_variation for norm in norms),
        )
        worst = max(range(len(norms)), key=lambda i: norms[i].distortion)
        notes.append(f"{what}: {mean.in_words()}; most in layer {worst}: {norms[worst].in_words()}")
    return notes
