"""Every layout computes what one process computes.

fp32: relative L2 error of each gradient and parameter at most 1e-5; sums over ranks are taken in another order, which
moves the last bits (about 1e-6 seen). bf16: two runs that round differently cannot agree to fp32's bound, so both are
compared with the fp32 run of one process, and a layout may be at most half as far again as one bf16 process is.
"""

import pytest
from cases import gather_unequal_replicas, train_steps, validation_losses
from whole import overall_error, relative_errors

LAYOUTS = {
    "tensor 2": (2, ["parallel.tensor_parallel=2"]),
    "tensor 2, sequence": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]),
    "pipeline 2": (2, ["parallel.pipeline_parallel=2"]),
    "data 2": (2, []),
    "data 2, distributed optimizer": (2, ["parallel.distributed_optimizer=true"]),
    "tensor 2, pipeline 2, sequence": (
        4,
        ["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "parallel.sequence_parallel=true"],
    ),
    "pipeline 2, data 2": (4, ["parallel.pipeline_parallel=2"]),
    "tensor 2, data 2, distributed optimizer": (
        4,
        ["parallel.tensor_parallel=2", "parallel.distributed_optimizer=true"],
    ),
}
ORDERS = {
    "pre": ["model.norm_order=pre"],
    "swin": ["model.norm_order=swin", "model.qk_norm_groups=2"],
}
CASES = [(layout, order) for layout, (world, _) in LAYOUTS.items() for order in ORDERS if world == 2 or order == "swin"]
"""Four processes take their time: they run the order with more norms only."""
BASE = ["model.num_query_groups=2", "training.z_loss=1e-3"]


@pytest.fixture(scope="module")
def reference(workers, module_config):
    """One process, by (order, precision)."""
    cache = {}

    def get(order, precision):
        if (order, precision) not in cache:
            config = module_config(*BASE, *ORDERS[order], f"training.precision={precision}")
            cache[order, precision] = workers.run(1, train_steps, config, 3)[0]
        return cache[order, precision]

    return get


@pytest.mark.parametrize(("layout", "order"), CASES)
def test_fp32_equals_one_process(workers, module_config, reference, layout, order):
    world_size, overrides = LAYOUTS[layout]
    config = module_config(*BASE, *ORDERS[order], *overrides)
    reports, gradients, parameters = workers.run(world_size, train_steps, config, 3)[-1]
    expected_reports, expected_gradients, expected_parameters = reference(order, "fp32")
    for got, expected in zip(reports, expected_reports, strict=True):
        for name in ("loss", "loss_text", "loss_image", "log_z", "grad_norm", "lr", "num_tokens"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5), name
    if "parallel.distributed_optimizer=true" not in overrides:  # it keeps only its own part of the gradients
        assert max(relative_errors(gradients, expected_gradients).values()) < 1e-5
    assert max(relative_errors(parameters, expected_parameters).values()) < 1e-5


@pytest.mark.parametrize("layout", ["tensor 2, sequence", "pipeline 2", "data 2"])
def test_bf16_is_as_near_to_fp32_as_one_process(workers, module_config, reference, layout):
    world_size, overrides = LAYOUTS[layout]
    config = module_config(*BASE, *ORDERS["pre"], *overrides, "training.precision=bf16")
    reports, gradients, _ = workers.run(world_size, train_steps, config, 1)[-1]
    _, exact, _ = reference("pre", "fp32")
    _, one_process, _ = reference("pre", "bf16")
    assert overall_error(gradients, exact) < 1.5 * overall_error(one_process, exact)
    assert reports[0]["loss"] == pytest.approx(reference("pre", "fp32")[0][0]["loss"], rel=5e-3)


def test_replicas_that_differ_are_noticed(workers, module_config):
    for said in workers.run(2, gather_unequal_replicas, module_config()):
        assert "differs on replica 1" in said


def test_validation_does_not_depend_on_the_number_of_ranks(workers, module_config):
    """Eleven validation documents do not divide over two ranks."""
    one = workers.run(1, validation_losses, module_config())[0]
    two = workers.run(2, validation_losses, module_config())[0]
    assert two == pytest.approx(one, rel=1e-6)


def test_loss_does_not_depend_on_micro_batches(workers, module_config, reference):
    config = module_config(*BASE, *ORDERS["pre"], "training.micro_batch_size=4")
    reports, gradients, _ = workers.run(1, train_steps, config, 1)[0]
    expected_reports, expected_gradients, _ = reference("pre", "fp32")
    assert reports[0]["loss"] == pytest.approx(expected_reports[0]["loss"], rel=1e-6)
    assert max(relative_errors(gradients, expected_gradients).values()) < 1e-5


def test_dropout_masks_agree_over_tensor_ranks(workers, module_config):
    """Without sequence parallelism the branch outputs are replicated, and so must be what is dropped of them."""
    one = workers.run(1, train_steps, module_config("model.dropout=0.3"), 2)[0]
    two = workers.run(2, train_steps, module_config("model.dropout=0.3", "parallel.tensor_parallel=2"), 2)[0]
    assert max(relative_errors(two[2], one[2]).values()) < 1e-5


def test_dropout_repeats_with_the_seed(workers, module_config):
    config = module_config("model.dropout=0.3")
    first = workers.run(2, train_steps, config, 2)[0]
    again = workers.run(2, train_steps, config, 2)[0]
    assert first[0] == again[0]
    other = workers.run(2, train_steps, module_config("model.dropout=0.3", "training.seed=77"), 2)[0]
    assert first[0] != other[0]
