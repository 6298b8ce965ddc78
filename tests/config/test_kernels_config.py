"""Choices of kernels that contradict each other, or the rest of a run, are refused before anything is built."""

import pytest

from megachameleon.config import load_config

TE = "kernels.linear=transformer_engine"
WIDE = ["model.hidden_size=64", "model.ffn_hidden_size=128"]
"""The debug preset's sides are not all multiples of 16."""
USERBUFFERS = [TE, "kernels.userbuffers=true", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]
REFUSED = {
    "another linear": (["kernels.fp8=te_tensorwise"], "kernels.fp8: te_tensorwise needs kernels.linear"),
    "sides": ([TE, "kernels.fp8=te_tensorwise", *WIDE, "model.ffn_hidden_size=200"], "multiplies sides of 16 n only"),
    "rows": ([TE, "kernels.fp8=te_tensorwise", *WIDE, "data.sequence_length=63"], "leaves 63 on a rank"),
    "rows on a rank": (
        [TE, "kernels.fp8=te_delayed", *WIDE, "data.sequence_length=40", "parallel.context_parallel=2"],
        "leaves 20 on a rank",
    ),
    "drawings": ([*USERBUFFERS, "logging.drawing.prompts=[sun]"], "kernels.userbuffers: true is made for the rows"),
    "fp32 buffers": ([*USERBUFFERS, "training.precision=fp32"], "kernels.userbuffers: True goes with"),
    "fp32 attention": (
        ["kernels.attention=transformer_engine", "training.precision=fp32"],
        "kernels.attention: transformer_engine goes with",
    ),
    "fp32 products": (["kernels.fp8=scaled_mm", *WIDE, "training.precision=fp32"], "kernels.fp8: scaled_mm goes with"),
    "no clipping by accident": (["optimizer.clip_grad=.nan"], "optimizer.clip_grad: nan must be a number"),
    "no z-loss by accident": (["training.z_loss=.nan"], "training.z_loss: nan must be a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case):
    overrides, message = REFUSED[case]
    rows = ["training.micro_batch_size=1", "training.global_batch_size=4", "training.precision=bf16"]
    with pytest.raises(ValueError, match=message.replace("(", "[(]")):
        load_config("debug", [*rows, *overrides])


def test_what_goes_together_is_accepted():
    load_config("debug", [TE, "kernels.fp8=te_tensorwise", *WIDE, "training.precision=bf16"])
    load_config("debug", ["kernels.fp8=scaled_mm", *WIDE, "training.precision=bf16"])
