"""Shapes and layouts say what the configuration says."""

import pytest

from megachameleon.config import load_config
from megachameleon.planning.communication import stage_parameters
from megachameleon.planning.shapes import Layout, TransformerShape


@pytest.mark.parametrize("preset", ["1b", "chameleon_7b", "chameleon_34b"])
def test_parameters_are_the_models_but_for_norms(preset):
    model = load_config(preset).model
    shape = TransformerShape.from_model(model, 4096)
    norms = (
        2 * model.num_layers + 1
    ) * model.hidden_size + model.num_layers * 4 * model.qk_norm_groups * model.head_dim
    assert shape.num_parameters + norms == model.num_parameters


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 4), (8, 2)])
def test_stages_and_tensor_ranks_share_all_parameters(tensor, stages):
    shape = TransformerShape.from_model(load_config("chameleon_34b").model, 4096)
    layout = Layout(world_size=64, global_batch_size=64, tensor_parallel=tensor, pipeline_parallel=stages)
    held = sum(stage_parameters(shape, layout, stage) for stage in range(stages))
    assert tensor * held == shape.num_parameters


def test_a_layout_counts_what_is_left_for_data():
    overrides = ["parallel.tensor_parallel=2", "parallel.context_parallel=2", "parallel.pipeline_parallel=2"]
    config = load_config("chameleon_7b", [*overrides, "training.micro_batch_size=4", "parallel.sequence_parallel=true"])
    layout = Layout.from_run(config, 64)
    assert (layout.data_parallel, layout.replicas, layout.num_micro_batches) == (8, 16, 2048 // 8 // 4)
    assert (layout.tokens_of_micro_batch(4096), layout.activation_split) == (4 * 4096 // 2, 2)
    assert layout.describe() == "TP2 PP2 CP2 DP8 mbs4"


def test_a_layout_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="start a multiple of 8"):
        Layout.from_run(load_config("chameleon_34b"), 100)


def test_kernels_and_recomputation_reach_the_layout():
    overrides = ["parallel.recompute=selective", "parallel.recompute_modules=[mlp]", "kernels.fp8=scaled_mm"]
    layout = Layout.from_run(load_config("chameleon_7b", [*overrides, "kernels.attention=reference"]), 8)
    assert (layout.recompute_modules, layout.precision, layout.attention) == (("mlp",), "fp8", "unfused")
    assert Layout.from_run(load_config("chameleon_7b"), 8).recompute_modules == ()
