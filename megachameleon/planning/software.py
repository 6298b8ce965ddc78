"""What a trainer's code overlaps and fuses, beside what the layout says: ours, and those that others published with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Traits of a code base, each read in its source or in what was published about it."""

    name: str
    """For people."""
    overlaps_backward: bool
    """Tensor-parallel messages of column-split layers run under backward's products."""
    overlaps_transfers: bool
    """Transfers between pipeline stages run under computation in the interleaved schedule."""
    splits_transfers: bool
    """Without sequence parallelism, each tensor rank sends its part and the receivers gather (Narayanan et al. 2021,
    section 4.1)."""
    logit_bytes: float
    """Read and written for each logit in cross entropy, forward and backward, beside the head's three products."""


OURS = Software(
    name="megachameleon",
    overlaps_backward=True,
    overlaps_transfers=True,
    splits_transfers=False,
    logit_bytes=6,  # read for the statistics; read and written for the gradient, both in bf16
)
MEGATRON_2021 = Software(
    name="Megatron-LM of Narayanan et al. 2021",
    overlaps_backward=False,
    overlaps_transfers=False,
    splits_transfers=True,
    logit_bytes=56,  # as MEGATRON_CORE
)
MEGATRON_2022 = Software(
    name="Megatron-LM of Korthikanti et al. 2022",
    overlaps_backward=True,
    overlaps_transfers=False,
    splits_transfers=True,
    logit_bytes=56,
)
MEGATRON_CORE = Software(
    name="Megatron-Core 0.8",
    overlaps_backward=True,
    overlaps_transfers=True,
    splits_transfers=False,
    logit_bytes=56,  # 10.67 ms for 8,192 x 65,536 logits on an H100 (Liger-Kernel 0.8.0's data), at 0.85 of 3.35 TB/s
)
LLAMA = Software(
    name="Llama 3's trainer",
    overlaps_backward=True,
    overlaps_transfers=True,
    splits_transfers=False,
    logit_bytes=56,
)
NEMO = Software(
    name="NeMo and Megatron-Bridge",
    overlaps_backward=True,
    overlaps_transfers=True,
    splits_transfers=False,
    logit_bytes=21,  # 4.02 ms where MEGATRON_CORE's 56 are: a fused kernel (Liger's, in the same data)
)
FOUNDRY = Software(
    name="LLM Foundry",
    overlaps_backward=False,
    overlaps_transfers=False,
    splits_transfers=False,
    logit_bytes=56,
)
