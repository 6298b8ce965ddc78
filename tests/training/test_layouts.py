"""Every layout computes what one process computes.

fp32: relative L2 error of each gradient and parameter at most 1e-5; sums over ranks are taken in another order, which
moves the last bits (about 2e-6 seen). bf16: two runs that round differently cannot agree to fp32's bound, so both are
compared with the fp32 run of one process, and a layout may be at most half as far again as one bf16 process is.

Half of the matrix runs with the fast tests; `make test-slow` runs all of it, with up to eight processes.
"""

import pytest
from cases import gather_unequal_replicas, train_steps, validation_losses
from whole import overall_error, relative_errors

DISTRIBUTED = "distributed_optimizer=true"
OVERLAP = f"{DISTRIBUTED} overlap_grad_reduce=true overlap_param_gather=true bucket_size=3000"
"""Small buckets: several of them make up the small model."""
SP = "tensor_parallel=2 sequence_parallel=true"
INTERLEAVED = "pipeline_parallel=2 virtual_pipeline_parallel=2"

LAYOUTS = {
    # name: (processes, settings of `parallel`, other overrides)
    "TP2": (2, "tensor_parallel=2", ""),
    "TP2-SP": (2, SP, ""),
    "TP4-SP": (4, "tensor_parallel=4 sequence_parallel=true", ""),
    "PP2": (2, "pipeline_parallel=2", ""),
    "PP4": (4, "pipeline_parallel=4", ""),
    "PP2-VPP2": (2, INTERLEAVED, ""),
    "PP4-VPP2": (4, "pipeline_parallel=4 virtual_pipeline_parallel=2", "model.num_layers=8"),
    "one process-overlap": (1, OVERLAP, ""),
    "DP2": (2, "", ""),
    "DP4": (4, "", ""),
    "DP2-distributed": (2, DISTRIBUTED, ""),
    "DP2-overlapped reduce": (2, "overlap_grad_reduce=true bucket_size=3000", ""),
    "DP2-overlap": (2, OVERLAP, "training.micro_batch_size=1"),
    "CP2": (2, "context_parallel=2", ""),
    "CP4": (4, "context_parallel=4", ""),
    "CP2-overlap": (2, f"context_parallel=2 {OVERLAP}", ""),
    "CP2-TP2": (4, "context_parallel=2 tensor_parallel=2", ""),
    "CP2-TP2-SP": (4, f"context_parallel=2 {SP}", ""),
    "CP2-PP2": (4, "context_parallel=2 pipeline_parallel=2", ""),
    "CP2-PP2-VPP2": (4, f"context_parallel=2 {INTERLEAVED}", ""),
    "CP2-DP2-distributed": (4, f"context_parallel=2 {DISTRIBUTED}", ""),
    "TP2-SP-PP2": (4, f"{SP} pipeline_parallel=2", ""),
    "TP2-SP-PP2-VPP2": (4, f"{SP} {INTERLEAVED}", ""),
    "TP2-DP2-distributed": (4, f"tensor_parallel=2 {DISTRIBUTED}", ""),
    "PP2-DP2": (4, "pipeline_parallel=2", ""),
    "PP2-VPP2-DP2-overlap": (4, f"{INTERLEAVED} {OVERLAP}", ""),
    "recompute selective": (1, "recompute=selective", ""),
    "recompute norms": (1, "recompute=selective recompute_modules=[layernorm]", "model.norm_order=pre"),
    "recompute full": (1, "recompute=full", ""),
    "TP2-SP-recompute selective": (2, f"{SP} recompute=selective", ""),
    "PP2-VPP2-recompute full": (2, f"{INTERLEAVED} recompute=full", ""),
    "CP2-recompute full": (2, "context_parallel=2 recompute=full", ""),
    "micro-batches of 1": (1, "", "training.micro_batch_size=1"),
    "one micro-batch": (1, "", "training.micro_batch_size=8"),
    "PP2, micro-batches of 4": (2, "pipeline_parallel=2", "training.micro_batch_size=4"),
    "TP4-PP2": (8, "tensor_parallel=4 pipeline_parallel=2", ""),
    "TP2-SP-PP2-DP2-overlap": (8, f"{SP} pipeline_parallel=2 {OVERLAP}", ""),
    "TP2-SP-PP2-CP2-distributed": (8, f"{SP} pipeline_parallel=2 context_parallel=2 {DISTRIBUTED}", ""),
    "TP2-SP-PP2-VPP2-DP2-overlap-selective": (8, f"{SP} {INTERLEAVED} {OVERLAP} recompute=selective", ""),
    "TP2-SP-CP2-DP2-overlap-full": (8, f"{SP} context_parallel=2 {OVERLAP} recompute=full", ""),
    "CP4-DP2": (8, "context_parallel=4", ""),
    "PP4-VPP2-CP2": (8, "pipeline_parallel=4 virtual_pipeline_parallel=2 context_parallel=2", "model.num_layers=8"),
    "DP8-overlap": (8, OVERLAP, "training.micro_batch_size=1"),
}
ORDERS = {
    "pre": ["model.norm_order=pre"],
    "swin": ["model.norm_order=swin", "model.qk_norm_groups=2"],
}
BASE = [
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "training.z_loss=1e-3",
    "optimizer.lr=1e-3",
]
"""The rate moves weights by a tenth in three steps. At the preset's 1e-2 they double, and last bits grow to 1e-5."""
QUICK = {
    "pre": ["TP2-SP", "PP2-VPP2", "DP2-overlap", "CP2", "recompute selective", "recompute full"],
    "swin": [
        "TP2", "TP2-SP", "PP2", "PP2-VPP2", "DP2", "DP2-distributed", "DP2-overlapped reduce", "CP2", "CP2-overlap",
        "CP2-TP2-SP", "TP2-SP-PP2-VPP2", "PP2-VPP2-DP2-overlap", "recompute selective", "PP2-VPP2-recompute full",
        "one micro-batch", "PP2, micro-batches of 4",
    ],
}  # fmt: skip
"""What the fast tests take: every axis, every feature, each order; four processes in the order with more norms."""


def fast_or_slow(cases, quick):
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


MATRIX = fast_or_slow(
    [
        (layout, order)
        for layout, (_, _, others) in LAYOUTS.items()
        for order in ORDERS
        if "norm_order" not in others or f"norm_order={order}" in others
    ],
    {(layout, order) for order, layouts in QUICK.items() for layout in layouts},
)


def overrides_of(layout):
    _, parallel, others = LAYOUTS[layout]
    return [*(f"parallel.{setting}" for setting in parallel.split()), *others.split()]


@pytest.fixture(scope="module")
def reference(workers, module_config):
    """One process, by overrides."""
    cache = {}

    def get(*overrides):
        if overrides not in cache:
            cache[overrides] = workers.run(1, train_steps, module_config(*BASE, *overrides), 3)[0]
        return cache[overrides]

    return get


def require_equal(ranks, expected):
    """Reports of all ranks, first gradients and final parameters within fp32's bound."""
    got = ranks[-1]
    assert all(reports == got[0] for reports, *_ in ranks), "ranks report different numbers"
    for mine, its in zip(got[0], expected[0], strict=True):
        assert mine.keys() == its.keys()
        for name in mine:
            assert mine[name] == pytest.approx(its[name], rel=1e-5), name
    if got[1] is not None:
        assert max(relative_errors(got[1], expected[1]).values()) < 1e-5
    assert max(relative_errors(got[2], expected[2]).values()) < 1e-5


@pytest.mark.parametrize(("layout", "order"), MATRIX)
def test_fp32_equals_one_process(workers, module_config, reference, layout, order):
    world_size, overrides = LAYOUTS[layout][0], overrides_of(layout)
    config = module_config(*BASE, *ORDERS[order], *overrides)
    layers = [override for override in overrides if override.startswith("model.num_layers")]
    require_equal(workers.run(world_size, train_steps, config, 3), reference(*ORDERS[order], *layers))


@pytest.mark.parametrize(
    ("layout",),
    fast_or_slow([("CP2-TP2-SP",), ("PP2-VPP2",), ("CP2-PP2",), ("TP2-SP-CP2-DP2-overlap-full",)], {("PP2-VPP2",)}),
)
def test_a_continuous_stream_equals_one_process(workers, module_config, reference, layout):
    stream = "data.isolate_documents=false"
    config = module_config(*BASE, *ORDERS["pre"], *overrides_of(layout), stream)
    require_equal(
        workers.run(LAYOUTS[layout][0], train_steps, config, 3), expected := reference(*ORDERS["pre"], stream)
    )
    assert expected[0][2]["loss"] != pytest.approx(reference(*ORDERS["pre"])[0][2]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "order"),
    fast_or_slow(
        [(layout, order) for layout in LAYOUTS if "num_layers" not in LAYOUTS[layout][2] for order in ORDERS
         if "norm_order" not in LAYOUTS[layout][2] or order == "pre"],
        {("TP2-SP", "pre"), ("PP2-VPP2", "pre"), ("DP2-overlap", "pre"), ("CP2", "pre")},
    ),
)  # fmt: skip
def test_bf16_is_as_near_to_fp32_as_one_process(workers, module_config, reference, layout, order):
    bf16 = "training.precision=bf16"
    config = module_config(*BASE, *ORDERS[order], *overrides_of(layout), bf16)
    reports, gradients, parameters = workers.run(LAYOUTS[layout][0], train_steps, config, 3)[-1]
    exact, one_process = reference(*ORDERS[order]), reference(*ORDERS[order], bf16)
    if gradients is not None:
        assert overall_error(gradients, exact[1]) < 1.5 * overall_error(one_process[1], exact[1])
    assert overall_error(parameters, exact[2]) < 1.5 * overall_error(one_process[2], exact[2])
    for got, expected in zip(reports, exact[0], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=5e-3)


def test_replicas_that_differ_are_noticed(workers, module_config):
    for said in workers.run(2, gather_unequal_replicas, module_config()):
        assert "differs on replica 1" in said


@pytest.mark.parametrize("layout", ["DP2", "CP2", "PP2-VPP2", "DP2-overlap"])
def test_validation_does_not_depend_on_the_layout(workers, module_config, layout):
    """Three samples divide neither over two ranks nor into rounds of a pipeline."""
    three = ["training.validation_samples=3", "training.micro_batch_size=1"]
    one = workers.run(1, validation_losses, module_config(*BASE, *three))[0]
    two = workers.run(2, validation_losses, module_config(*BASE, *overrides_of(layout), *three))[0]
    assert two == pytest.approx(one, rel=1e-6)
