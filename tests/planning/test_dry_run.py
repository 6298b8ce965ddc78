"""The dry run builds every stage of the published models, on no device, whatever the layout."""

import pytest

from megachameleon.config import load_config
from megachameleon.parallel.device import install, pick_device
from megachameleon.planning.dry_run import count_stages

PUBLISHED = {"chameleon_7b": 7_013_158_912, "chameleon_34b": 34_293_522_432}
LAYOUTS = [  # tensor, pipeline, virtual pipeline
    ("chameleon_7b", 1, 1, 1),
    ("chameleon_7b", 8, 1, 1),
    ("chameleon_7b", 2, 4, 1),
    ("chameleon_7b", 1, 16, 1),
    ("chameleon_34b", 1, 1, 1),
    ("chameleon_34b", 8, 1, 1),
    ("chameleon_34b", 4, 4, 3),
    ("chameleon_34b", 2, 12, 1),
]


def whole_on_each_tensor_rank(model):
    """Parameters that tensor parallelism does not split: the norms of blocks, of queries and keys, and the last."""
    qk_norm = 4 * model.qk_norm_groups * model.head_dim
    return model.num_layers * (2 * model.hidden_size + qk_norm) + model.hidden_size


@pytest.mark.parametrize(("preset", "tensor", "pipeline", "virtual"), LAYOUTS)
def test_stages_add_up_to_the_published_model(preset, tensor, pipeline, virtual):
    layout = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "virtual_pipeline_parallel": virtual,
        "sequence_parallel": tensor > 1,
    }
    config = load_config(preset, [f"parallel.{name}={value}" for name, value in layout.items()])
    install(pick_device())
    stages = count_stages(config, 2 * tensor * pipeline)
    assert [stage.stage for stage in stages] == list(range(pipeline))
    assert sum(stage.layers for stage in stages) == config.model.num_layers
    copies = (tensor - 1) * whole_on_each_tensor_rank(config.model)
    assert tensor * sum(stage.parameters for stage in stages) - copies == PUBLISHED[preset]
