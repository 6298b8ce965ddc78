"""What is not finite on one rank never reaches the optimizer of any."""

import pytest
from trouble_cases import steps_with_a_nan

OVERLAP = ["distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"]
CASES = {
    "TP2": (2, ["parallel.tensor_parallel=2"]),
    "PP2": (2, ["parallel.pipeline_parallel=2"]),
    "DP2, distributed, bf16": (2, [*(f"parallel.{name}=true" for name in OVERLAP), "training.precision=bf16"]),
    "DP2": (2, []),
    "plain kernels, bf16": (1, ["kernels.optimizer=reference", "kernels.norm=reference", "training.precision=bf16"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_nan_on_one_rank_changes_nothing_anywhere(workers, config, name):
    ranks, overrides = CASES[name]
    for seen in workers.run(ranks, steps_with_a_nan, config(*overrides), ranks - 1, 1):
        (first, *_, first_changed), (bad, finite, changed), (last, *_, last_changed) = seen
        assert first is None and first_changed
        assert bad == "gradient norm is nan" and not finite and not changed
        assert last is None and last_changed
