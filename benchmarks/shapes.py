"""Sizes of the compared decoders and the arithmetic that a token costs."""

from dataclasses import dataclass

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s of the SXM boards, by a part of the name that CUDA reports."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A pre-norm decoder with QK-norm, SwiGLU, rotary positions and an untied head, and the batch it is fed."""

    layers: int
    """Of the decoder."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Of queries."""
    kv_groups: int
    """Heads of keys and values."""
    ffn: int
    """Inner width of SwiGLU."""
    vocab: int = 65_536
    """Ids."""
    sequence_length: int = 4_096
    """Positions of a sample."""
    micro_batch_size: int = 1
    """Samples in a step."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Positions in a step."""
        return self.sequence_length * self.micro_batch_size

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters of the matrices of all layers."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_groups * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """Parameters of matrices: layers, embedding and head."""
        return self.layer_matrix_parameters + 2 * self.vocab * self.hidden

    def flops_per_token(self, *, causal: bool) -> float:
        """FLOPs of forward and backward for one token, without recomputation.

        Args:
            causal: count the visible half of the attention matrix (`mfu_causal`), or all of it (`mfu_full_attn`).
        """
        # scores and values are two products, each 2 FLOPs forwards and 4 backwards
        attention = 12 * self.layers * self.sequence_length * self.hidden * (0.5 if causal else 1.0)
        # 2 FLOPs a parameter forwards, 4 backwards; the embedding is a look-up
        return 6 * (self.layer_matrix_parameters + self.vocab * self.hidden) + attention

    def validate(self) -> None:
        """Raise ValueError for sizes that do not divide."""
        if min(self.layers, self.hidden, self.heads, self.kv_groups, self.ffn, self.micro_batch_size) < 1:
            raise ValueError("--layers, --hidden, --heads, --kv-groups, --ffn, --micro-batch-size: must be at least 1")
        if self.hidden % self.heads or self.head_dim % 2:
            raise ValueError(f"--hidden {self.hidden}: must be an even multiple of --heads {self.heads}")
        if self.heads % self.kv_groups:
            raise ValueError(f"--heads {self.heads}: must be a multiple of --kv-groups {self.kv_groups}")
        if self.vocab < 64 or self.sequence_length < 2:
            raise ValueError(
                f"--vocab {self.vocab}, --sequence-length {self.sequence_length}: need at least 64 ids and 2 positions"
            )


PRESETS = {
    "cpu": Shape(layers=8, hidden=512, heads=8, kv_groups=8, ffn=1_408, sequence_length=1_024),
    "0.56b": Shape(layers=20, hidden=1_280, heads=10, kv_groups=10, ffn=3_456),
    "1.48b": Shape(layers=24, hidden=2_048, heads=16, kv_groups=16, ffn=5_504),
    "2.24b": Shape(layers=24, hidden=2_560, heads=20, kv_groups=20, ffn=6_912),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU, or None where it is not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)
