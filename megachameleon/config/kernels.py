"""Which implementation computes each operation of the decoder."""

from dataclasses import dataclass, fields
from typing import Literal

from megachameleon.config.model import ModelConfig
from megachameleon.config.parallel import ParallelConfig

Float8 = Literal["none", "te_delayed", "te_tensorwise", "scaled_mm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig:
    """Backend of each operation; `auto` takes what is known to be fast here, see docs/guides/gpu.md."""

    embedding: Literal["auto", "reference", "torch"] = "auto"
    """Token embedding; `torch` adds the rows that a micro-batch learns straight to the fp32 sum."""
    norm: Literal["auto", "reference", "torch", "transformer_engine"] = "auto"
    """RMSNorm of blocks."""
    qk_norm: Literal["auto", "reference", "torch", "transformer_engine"] = "auto"
    """Norm of queries and keys."""
    rotary: Literal["auto", "reference", "torch"] = "auto"
    """RoPE."""
    attention: Literal["auto", "reference", "torch", "transformer_engine"] = "auto"
    """Scores, softmax and weighted sum, in one kernel where there is one."""
    swiglu: Literal["auto", "reference", "torch", "liger"] = "auto"
    """Activation of the feed-forward."""
    linear: Literal["auto", "reference", "torch", "apex", "transformer_engine"] = "auto"
    """Matrices of blocks. All but `reference` add the weight's gradient straight to the fp32 sum."""
    loss: Literal["auto", "reference", "torch"] = "auto"
    """Head, cross entropy and z-loss; all but `reference` never hold the logits of a whole micro-batch."""
    optimizer: Literal["auto", "reference", "torch", "apex", "transformer_engine"] = "auto"
    """Adam's update."""
    fp8: Float8 = "none"
    """Precision of the blocks' matrix products. `te_*` are recipes of Transformer Engine: scales from earlier
    micro-batches, or from each tensor. `scaled_mm` is torch's own, with a scale for each row; weight gradients stay in
    bf16."""
    userbuffers: bool = False
    """Overlap tensor-parallel communication with Transformer Engine's matrix products."""

    def validate(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raise ValueError for the first choice that contradicts another. What the machine lacks is found later."""
        te_linear = self.linear == "transformer_engine"
        if self.fp8.startswith("te_") and not te_linear:
            raise ValueError(f"kernels.fp8: {self.fp8} needs kernels.linear=transformer_engine, not {self.linear}")
        if self.fp8 != "none":
            self._require_sides_of_sixteen(model, parallel)
        if self.fp8 == "te_delayed" and parallel.recompute == "selective" and "layernorm" in parallel.recompute_modules:
            raise ValueError(
                "kernels.fp8: te_delayed cannot recompute norms; take layernorm out of parallel.recompute_modules, or "
                "kernels.fp8=te_tensorwise"
            )
        if self.fp8 == "scaled_mm" and self.linear not in ("auto", "torch", "apex"):
            raise ValueError(f"kernels.fp8: scaled_mm needs kernels.linear=torch or apex, not {self.linear}")
        if self.userbuffers and not (te_linear and parallel.sequence_parallel and parallel.tensor_parallel > 1):
            raise ValueError(
                "kernels.userbuffers: needs kernels.linear=transformer_engine, parallel.tensor_parallel > 1 and "
                "parallel.sequence_parallel=true; set them, or kernels.userbuffers=false"
            )
        if self.attention == "transformer_engine" and parallel.context_parallel > 1:
            raise ValueError(
                f"kernels.attention: transformer_engine does not take parallel.context_parallel="
                f"{parallel.context_parallel} here; use kernels.attention=torch"
            )

    def require_bf16(self) -> None:
        """Raise ValueError for a choice that fp32 runs cannot have."""
        needs = {"kernels.fp8": self.fp8 != "none", "kernels.userbuffers": self.userbuffers}
        needs["kernels.attention"] = self.attention == "transformer_engine"
        for name in (name for name, needed in needs.items() if needed):
            value = getattr(self, name.partition(".")[2])
            raise ValueError(f"{name}: {value} goes with training.precision=bf16, not fp32")

    def _require_sides_of_sixteen(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        # cuBLAS multiplies FP8 in sides of 16 only, whoever calls it.
        split = parallel.tensor_parallel
        queries, keys = (n * model.head_dim for n in (model.num_attention_heads, model.num_query_groups))
        sides = {
            "model.hidden_size": model.hidden_size,
            "heads * head dimension on a rank": queries // split,
            "width of queries, keys and values on a rank": (queries + 2 * keys) // split,
            "model.ffn_hidden_size on a rank": model.ffn_hidden_size // split,
        }
        for name, size in sides.items():
            if size % 16:
                raise ValueError(
                    f"kernels.fp8: {self.fp8} multiplies sides of 16 n only, and {name} is {size}; widen it to "
                    f"a multiple of 16, or set kernels.fp8=none"
                )


OPERATIONS = tuple(field.name for field in fields(KernelsConfig) if field.name not in ("fp8", "userbuffers"))
"""Names of the fields that choose a backend."""
