"""Messages in closed form, against limits and against what ranks of a fake world really send."""

from dataclasses import replace

import pytest

from megachameleon.config import load_config
from megachameleon.planning.communication import communication_of, seconds_on_the_wire
from megachameleon.planning.shapes import Layout, TransformerShape

SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=4",
         "model.ffn_hidden_size=160", "model.vocab_size=512", "training.precision=bf16",
         "training.global_batch_size=16", "training.micro_batch_size=1"]  # fmt: skip
SPLIT = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "tensor, recomputed": ["parallel.tensor_parallel=2", "parallel.recompute=full"],
    "sequence, pipeline, replicas": [
        *SPLIT,
        *("parallel.pipeline_parallel=2", "parallel.distributed_optimizer=true"),
        *("parallel.recompute=selective", "parallel.recompute_modules=[mlp]"),
    ],
    "context": ["parallel.context_parallel=2", "parallel.distributed_optimizer=true"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_sends_what_is_planned(name):
    from megachameleon.planning.fake_step import count_rank

    config = load_config("debug", [*SMALL, *LAYOUTS[name]])
    layout = Layout.from_run(config, 8)
    shape = TransformerShape.from_model(config.model, config.data.sequence_length)
    for stage in range(layout.pipeline_parallel):
        counted = count_rank(config, stage * 8 // layout.pipeline_parallel, 8).traffic
        planned = communication_of(shape, layout, stage)
        for axis in ("tensor", "context", "pipeline", "data"):
            for kind, messages in getattr(planned, axis).items():
                real = [volume for key, volume in counted.items() if (key.axis, key.kind) == (axis, kind)]
                # Norms, padding and sums of a few numbers are not planned: 2 % of so small a model's parameters.
                assert sum(volume.bytes for volume in real) == pytest.approx(messages.bytes, rel=0.02), (axis, kind)
                few = 2 if axis == "data" or kind == "all_reduce" else 0
                assert 0 <= sum(volume.count for volume in real) - messages.count <= few, (axis, kind)


def shape_and_layout(**axes):
    shape = TransformerShape.from_model(load_config("chameleon_34b").model, 4096)
    return shape, Layout(world_size=64, global_batch_size=64, **axes)


def test_one_rank_sends_nothing():
    shape, layout = shape_and_layout()
    alone = communication_of(shape, replace(layout, world_size=1))
    assert not (alone.tensor or alone.context or alone.pipeline or alone.data)


def test_what_one_stage_sends_its_neighbours_receive():
    shape, layout = shape_and_layout(pipeline_parallel=4, virtual_pipeline_parallel=3)
    stages = [communication_of(shape, layout, stage).pipeline for stage in range(4)]
    assert sum(s["send"].bytes for s in stages) == sum(s["recv"].bytes for s in stages)
    borders = 4 * 3 - 1
    assert sum(s["send"].count for s in stages) == 2 * borders * layout.num_micro_batches


def test_sequence_parallelism_moves_half_as_much_again_for_the_second_gather():
    shape, layout = shape_and_layout(tensor_parallel=8)
    split = replace(layout, sequence_parallel=True)

    def seconds(layout):  # of layers: ends and statistics cancel between two depths
        deep, flat = (communication_of(replace(shape, num_layers=n), layout).tensor for n in (48, 24))
        whole = {kind: deep[kind].bytes - flat[kind].bytes for kind in deep}
        return sum(seconds_on_the_wire(kind, size, 8, 1e9) for kind, size in whole.items())

    assert seconds(split) == pytest.approx(seconds(layout) * 10 / 8)  # six gathers and four scatters, for four sums


def test_a_sum_is_a_scatter_and_a_gather():
    parts = [seconds_on_the_wire(kind, 1e9, 8, 1e9) for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    assert parts[0] + parts[1] == parts[2] == pytest.approx(2 * 7 / 8)
    assert seconds_on_the_wire("all_reduce", 1e9, 10**6, 1e9) == pytest.approx(2, rel=1e-5)  # however many ranks


def test_gradients_are_sent_once_a_step_and_activations_with_each_micro_batch():
    shape, layout = shape_and_layout(tensor_parallel=2)
    once, twice = (communication_of(shape, replace(layout, global_batch_size=n)) for n in (64, 128))
    assert twice.data == once.data
    assert twice.tensor["all_reduce"].bytes == 2 * once.tensor["all_reduce"].bytes
