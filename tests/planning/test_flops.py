"""FLOPs as torch counts them in the real decoder."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megachameleon.config import ParallelConfig, load_config
from megachameleon.parallel.context import parallel_context
from megachameleon.planning.flops import flops_of
from megachameleon.planning.shapes import TransformerShape

PLAIN = ["kernels.attention=reference", "kernels.loss=reference", "kernels.linear=reference"]
"""Kernels made of operations that torch's counter knows."""


@pytest.mark.parametrize("groups", [1, 4])
def test_a_real_decoder_does_as_many(groups):
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels

    config = load_config("debug", [*PLAIN, f"model.num_query_groups={groups}"])
    with parallel_context(ParallelConfig()) as context:
        kernels = choose_kernels(config.kernels)
        options = {"dtype": torch.float32, "seed": 1}
        decoder = build_decoder(config.model, config.parallel, kernels, context.groups, **options)
        tokens = torch.randint(0, 128, (2, 64))
        with FlopCounterMode(display=False) as counter:
            logits = decoder(tokens, torch.arange(64).expand(2, -1), torch.zeros(2, 64, dtype=torch.int32))
            logits.sum().backward()
    derived = flops_of(TransformerShape.from_model(config.model, 64)).total("full") * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(derived, rel=1e-6)


def test_conventions_differ_by_attention_and_by_a_second_forward_pass():
    flops = flops_of(TransformerShape.from_model(load_config("chameleon_7b").model, 4096))
    assert flops.total("full") - flops.total("causal") == flops.attention / 2
    assert flops.total("recomputed") - flops.total("full") == pytest.approx((flops.matrices + flops.attention) / 3)
    # 43.69 and 46.91 GFLOP a token: 6 x 6,744,768,512 matrix parameters and 12 x 32 layers x 4,096 x 4,096
    assert flops.total("causal") == 6 * (7_013_158_912 - 65_536 * 4096 - 65 * 4096 - 32 * 4 * 128) + 6 * 32 * 4096**2
