"""The dry run builds every stage of the published models, on no device, whatever the layout."""

import pytest

from megachameleon.config import load_config
from megachameleon.planning.fake_step import count_rank

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
    world = 2 * tensor * pipeline
    stages = [count_rank(config, stage * 2 * tensor, world, train=False) for stage in range(pipeline)]
    assert [stage.stage for stage in stages] == list(range(pipeline))
    assert sum(stage.layers for stage in stages) == config.model.num_layers
    copies = (tensor - 1) * whole_on_each_tensor_rank(config.model)
    assert tensor * sum(stage.parameters for stage in stages) - copies == PUBLISHED[preset]


def test_a_dry_run_refuses_drawings_without_an_image_tokenizer(config):
    from megachameleon.planning.dry_run import dry_run

    with pytest.raises(ValueError, match=r"data.image_tokenizer: missing; logging.drawing.prompts needs it"):
        dry_run(config("logging.drawing.prompts=[sun]"), None)


def test_a_dry_run_looks_at_the_checkpoint_that_the_run_would_resume(config, workers):
    from cases import run_training

    from megachameleon.planning.dry_run import dry_run

    workers.run(1, run_training, config("training.num_steps=4", "optimizer.warmup_steps=2"))
    steps = ["training.num_steps=6", "optimizer.warmup_steps=2"]
    assert "step_00000004" in dry_run(config(*steps), None)
    assert "step_00000004" in dry_run(config(*steps, "parallel.distributed_optimizer=true"), None)
    for override, message in (
        ("data.isolate_documents=false", "data.isolate_documents: False, but .* was trained with True"),
        ("model.num_layers=3", "num_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            dry_run(config(*steps, override), None)
