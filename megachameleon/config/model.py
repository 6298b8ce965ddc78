"""What the decoder is."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and mathematics of the decoder (arXiv 2405.09818, sections 2.3 and 2.4)."""

    vocab_size: int = 65_536
    """Ids of the mixed-modal vocabulary; must equal the tokenizer's."""
    num_layers: int
    """Blocks."""
    hidden_size: int
    """Width of hidden states."""
    num_attention_heads: int
    """Heads of queries."""
    num_query_groups: int
    """Key/value heads; equal to `num_attention_heads` for multi-head attention."""
    ffn_hidden_size: int
    """Width of SwiGLU's inner layer."""
    context_length: int = 4_096
    """Longest sequence that generation may reach."""
    norm_order: Literal["pre", "swin"] = "pre"
    """`pre`: x + f(norm(x)) (7B). `swin`: x + norm(f(x)) (34B)."""
    norm_eps: float = 1e-5
    """Of all norms, QK-norm too; published models have 1e-5 for both."""
    qk_norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Normalisation of queries and keys over the head dimension, before RoPE."""
    qk_norm_groups: int = 1
    """Contiguous groups of heads with an affine of their own: 1 for the 7B, 4 for the released 34B."""
    rope_theta: float = 10_000.0
    """Base of RoPE's frequencies."""
    dropout: float = 0.0
    """After attention and after feed-forward, just before the residual addition."""
    embedding_dropout: float = 0.0
    """After the embedding; the paper states none."""
    init_std: float = 0.02
    """Standard deviation of initial weights; the paper states none."""
    depth_scaled_init: bool = True
    """Divide the initial output projections of each block by sqrt(2 * num_layers)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embeddings and head included."""
        h, key_value = self.hidden_size, self.num_query_groups * self.head_dim
        # Vectors of the head dimension: weight and bias, for queries and for keys.
        qk_norm = {"layernorm": 4, "rmsnorm": 2, "none": 0}[self.qk_norm] * self.qk_norm_groups * self.head_dim
        layer = 2 * h * h + 2 * h * key_value + 3 * h * self.ffn_hidden_size + 2 * h + qk_norm
        return 2 * self.vocab_size * h + self.num_layers * layer + h

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
                     "ffn_hidden_size", "context_length", "qk_norm_groups"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: {getattr(self, name)} must be at least 1")
        _require_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _require_divides("num_attention_heads", self.num_attention_heads, "num_query_groups", self.num_query_groups)
        # Keys are normed in as many groups as queries, and there are fewer heads of keys.
        if self.num_query_groups % self.qk_norm_groups:
            works = [n for n in range(1, self.num_query_groups + 1) if self.num_query_groups % n == 0]
            raise ValueError(
                f"model.qk_norm_groups: {self.qk_norm_groups} does not divide model.num_query_groups="
                f"{self.num_query_groups}; {', '.join(map(str, works))} would work"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.hidden_size: head dimension {self.head_dim} must be even for RoPE")
        if not 1 <= self.rope_theta < 1e12 or not 0 < self.init_std < 10 or not 0 < self.norm_eps < 1:
            raise ValueError(
                f"model.rope_theta={self.rope_theta}, init_std={self.init_std}, norm_eps={self.norm_eps}: must lie in "
                "[1, 1e12), (0, 10) and (0, 1)"
            )
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}: {getattr(self, name)} must be in [0, 1)")


def _require_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(
            f"model.{name}: {value} is not divisible by {divisor_name}={divisor}; "
            f"{_multiples(value, divisor)} would work"
        )


def _multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else str(divisor)
