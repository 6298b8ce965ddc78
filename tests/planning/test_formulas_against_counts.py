"""The planner's closed forms against what the dry run counts of the real model, optimizer and schedule."""

import pytest

from megachameleon.config import load_config
from megachameleon.planning.communication import communication_of
from megachameleon.planning.counting import PARTS
from megachameleon.planning.fake_step import count_rank
from megachameleon.planning.memory import layer_bytes, memory_of
from megachameleon.planning.shapes import Layout, TransformerShape

FEW, EIGHT = "model.num_layers=4", "model.num_layers=8"
VPP2 = "virtual_pipeline_parallel=2"
SP = "tensor_parallel=2 sequence_parallel=true"
CASES = {
    # preset, world, stage, settings of `parallel`, other overrides
    "7B": ("chameleon_7b", 64, 0, "", FEW),
    "7B full": ("chameleon_7b", 64, 0, "recompute=full", FEW),
    "7B CP2": ("chameleon_7b", 64, 0, f"{SP} context_parallel=2", f"{FEW} model.dropout=0"),
    "34B TP8": ("chameleon_34b", 64, 0, "tensor_parallel=8 pipeline_parallel=1", FEW),
    "34B PP2 VPP2": ("chameleon_34b", 64, 0, f"pipeline_parallel=2 {VPP2}", FEW),
    "34B PP2, last": ("chameleon_34b", 64, 1, "pipeline_parallel=2", FEW),
    "7B TP2": ("chameleon_7b", 64, 0, "tensor_parallel=2", FEW),
    "7B SP, micro-batch 2": ("chameleon_7b", 64, 0, SP, f"{FEW} training.micro_batch_size=2"),
    "7B norms": ("chameleon_7b", 64, 0, "recompute=selective recompute_modules=[layernorm]", FEW),
    "7B feed-forward": ("chameleon_7b", 64, 0, "recompute=selective recompute_modules=[mlp]", FEW),
    "7B norms and feed-forward": ("chameleon_7b", 64, 0, "recompute=selective", FEW),
    "7B fp32": ("chameleon_7b", 64, 0, "", f"{FEW} training.precision=fp32"),
    "34B PP4 VPP2, third": ("chameleon_34b", 64, 2, f"pipeline_parallel=4 {VPP2}", EIGHT),
    "34B PP4 VPP2, last": ("chameleon_34b", 64, 3, f"pipeline_parallel=4 {VPP2}", EIGHT),
    "34B PP4 full": ("chameleon_34b", 64, 1, "pipeline_parallel=4 recompute=full", EIGHT),
    "7B whole": ("chameleon_7b", 1024, 0, "", ""),
    "34B whole TP8": ("chameleon_34b", 3072, 0, "tensor_parallel=8 pipeline_parallel=1", ""),
    "34B whole, last": ("chameleon_34b", 3072, 1, "", ""),
    "34B whole VPP3": ("chameleon_34b", 3072, 0, "pipeline_parallel=4 virtual_pipeline_parallel=3", ""),
}  # fmt: skip
QUICK = ["7B full", "7B CP2", "34B PP2 VPP2", "34B PP2, last"]


@pytest.fixture(
    scope="module", params=[*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x not in QUICK)]
)
def case(request):
    """Shape, layout, stage and count."""
    preset, world, stage, parallel, others = CASES[request.param]
    config = load_config(preset, [*(f"parallel.{setting}" for setting in parallel.split()), *others.split()])
    count = count_rank(config, stage * (world // config.parallel.pipeline_parallel), world)
    shape = TransformerShape.from_model(config.model, config.data.sequence_length)
    return shape, Layout.from_run(config, world), stage, count


def test_memory_is_the_counted_one(case):
    """The whole to 2 %; each part to 5 %, or to 1 % of the whole where it is small.

    Where the head and backward need about as much, either may be the peak; the whole says all then.
    """
    shape, layout, stage, count = case
    formula = memory_of(shape, layout, stage)
    assert formula.total == pytest.approx(count.total, rel=0.02)
    same_moment = (formula.head > 0) == (count.peak.get("head", 0) > formula.total / 1_000)
    for part in PARTS if same_moment else PARTS[:3]:
        counted = count.peak.get(part, 0)
        assert abs(getattr(formula, part) - counted) <= max(0.05 * counted, 0.01 * count.total), part


def test_messages_are_the_counted_ones(case):
    """Exactly, but for what the formulas leave out: norms, whose gradients tensor ranks sum in a message of their own,
    and messages of a few numbers."""
    shape, layout, stage, count = case
    formula = communication_of(shape, layout, stage)
    for kind, counted in count.traffic.items():
        if kind.axis in ("world", "model") or counted.bytes < 1e7:
            continue
        messages = getattr(formula, kind.axis)[kind.kind]
        if kind.axis == "data":
            assert messages.bytes == pytest.approx(counted.bytes, rel=1e-3)
        else:
            of_norms = int(kind.axis == "tensor" and kind.kind == "all_reduce")
            assert counted.count == messages.count + of_norms, kind
            assert messages.bytes == pytest.approx(counted.bytes, rel=1e-4 if of_norms else 0), kind
    for axis in ("tensor", "context", "pipeline", "data"):
        for kind in getattr(formula, axis):
            assert any(found.axis == axis and found.kind == kind for found in count.traffic), (axis, kind)


@pytest.mark.parametrize(
    ("recompute", "modules", "published"),
    [("none", (), lambda s, h, a, t: h * (34 + 5 * a * s / h) / t),
     ("selective", ("core_attn",), lambda s, h, a, t: 34 * h / t),
     ("full", (), lambda s, h, a, t: 2 * h / t)],
)  # fmt: skip
@pytest.mark.parametrize(("hidden", "heads"), [(6144, 64), (12288, 96), (20480, 128), (25600, 160)])
def test_a_layer_of_gpt_keeps_what_korthikanti_et_al_say(hidden, heads, recompute, modules, published):
    """Bytes of a token in a layer, with sequence parallelism over 8 ranks: arXiv 2205.05198, table 2. Full
    recomputation keeps a rank's part of the input, as ours does; theirs keeps all of it, 2h."""
    shape = TransformerShape(
        num_layers=1, hidden_size=hidden, num_attention_heads=heads, num_query_groups=heads,
        ffn_hidden_size=4 * hidden, gated=False, vocab_size=51_200, sequence_length=2_048,
        dropout=True, attention_dropout=True, bias=True,
    )  # fmt: skip
    layout = Layout(
        world_size=8, global_batch_size=1, tensor_parallel=8, sequence_parallel=True, attention="unfused",
        recompute=recompute, recompute_modules=modules,
    )  # fmt: skip
    assert layer_bytes(shape, layout) == pytest.approx(published(2_048, hidden, heads, 8), rel=1e-9)
