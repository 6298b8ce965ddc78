"""The step time: the pipeline's bubble against simulated schedules, and what must follow whatever the constants."""

from dataclasses import replace

import pytest

from megachameleon.config import load_config
from megachameleon.planning.cost import bubble_fraction, cost_of, model_flops_per_second
from megachameleon.planning.hardware import CLUSTERS
from megachameleon.planning.shapes import Layout, TransformerShape

SHAPE = TransformerShape.from_model(load_config("chameleon_34b").model, 4096)
LAYOUT = Layout(
    world_size=256,
    global_batch_size=256,
    tensor_parallel=4,
    pipeline_parallel=4,
    sequence_parallel=True,
    distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
)


def order_of_work(stage, stages, chunks, micro_batches):
    """What a stage does: (direction, chunk, micro-batch) in 1F1B, or in the interleaved schedule in rounds."""
    rounds = range(0, micro_batches, stages) if chunks > 1 else range(micro_batches)
    size = stages if chunks > 1 else 1
    going = [(chunk, m) for r in rounds for chunk in range(chunks) for m in range(r, r + size)]
    back = [(chunks - 1 - chunk, m) for chunk, m in going]
    behind = stages - stage - 1
    warm_up = min(len(going), behind if chunks == 1 else 2 * behind + (chunks - 1) * stages)
    work = [("forward", *one) for one in going[:warm_up]]
    for one, other in zip(going[warm_up:], back, strict=False):
        work += [("forward", *one), ("backward", *other)]
    return work + [("backward", *one) for one in back[len(going) - warm_up :]]


def simulate(stages, chunks, micro_batches, forward, backward):
    """Time at which the last stage is done, by running each stage's list as soon as what it needs is there."""
    lists = [order_of_work(stage, stages, chunks, micro_batches) for stage in range(stages)]
    done, clocks, positions = {}, [0.0] * stages, [0] * stages
    last = stages * chunks - 1
    while any(positions[s] < len(lists[s]) for s in range(stages)):
        moved = False
        for stage in range(stages):
            while positions[stage] < len(lists[stage]):
                direction, chunk, m = lists[stage][positions[stage]]
                depth = chunk * stages + stage
                needs = ("forward", depth - 1, m) if direction == "forward" else ("backward", depth + 1, m)
                if direction == "backward" and depth == last:
                    needs = ("forward", depth, m)
                if needs[1] >= 0 and needs not in done:
                    break
                start = max(clocks[stage], done.get(needs, 0.0))
                clocks[stage] = start + (forward if direction == "forward" else backward)
                done[direction, depth, m] = clocks[stage]
                positions[stage] += 1
                moved = True
        assert moved, "the schedule deadlocks"
    return max(clocks)


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"),
    [(1, 1, 3), (2, 1, 5), (4, 1, 4), (8, 1, 24), (2, 3, 4), (4, 2, 8), (4, 5, 12)],
)
def test_the_bubble_is_that_of_a_simulated_schedule(stages, chunks, micro_batches):
    forward, backward = 1.0, 2.0
    working = micro_batches * chunks * (forward + backward)
    simulated = simulate(stages, chunks, micro_batches, forward, backward)
    assert simulated == pytest.approx(working * (1 + bubble_fraction(stages, chunks, micro_batches)))


def time_of(shape=SHAPE, cluster="h100", **changes):
    return cost_of(shape, replace(LAYOUT, **changes), CLUSTERS[cluster])


def test_parts_are_the_whole_and_none_is_negative():
    parts = time_of().parts()
    assert sum(parts.values()) == time_of().total and min(parts.values()) >= 0
    assert set(parts) == {"matrices", "attention", "passes", "head", "tensor", "context", "bubble", "transfers", "data",
                          "optimizer", "other"}  # fmt: skip


def test_one_gpu_exchanges_nothing():
    alone = cost_of(SHAPE, Layout(world_size=1, global_batch_size=2), CLUSTERS["h100"])
    assert alone.tensor == alone.context == alone.data == alone.bubble == alone.transfers == 0
    assert alone.matrices > alone.attention > 0


def test_no_layout_is_faster_than_the_peak():
    for cluster in CLUSTERS:
        seconds = time_of(cluster=cluster).total
        reached = model_flops_per_second(SHAPE, LAYOUT, seconds)
        assert 0.2 < reached / CLUSTERS[cluster].flops_per_second("bf16") < 0.9


def test_recomputation_costs_about_a_forward_pass():
    kept, again = time_of(), time_of(recompute="full")
    assert 1.30 < again.matrices / kept.matrices < 1.36
    mlp = time_of(recompute="selective", recompute_modules=("mlp",))
    share = 2 * 3 * 8192 * 22016 / (2 * SHAPE.layer_matrix_parameters)  # of a layer's forward products
    assert (mlp.matrices - kept.matrices) / (again.matrices - kept.matrices) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("slower", "part"),
    [
        ({"tensor_parallel": 8, "world_size": 512}, "tensor"),
        ({"global_batch_size": 128}, "bubble"),
        ({"overlap_grad_reduce": False, "overlap_param_gather": False}, "data"),
        ({"attention": "unfused"}, "attention"),
        ({"context_parallel": 2, "world_size": 512}, "context"),
    ],
)
def test_what_makes_a_part_dearer(slower, part):
    def share(time):
        return getattr(time, part) / time.total

    assert share(time_of(**slower)) > share(time_of()) * 1.05


def test_what_overlaps_costs_less():
    assert time_of(overlap_tensor_parallel=True).tensor < time_of().tensor
    assert time_of(virtual_pipeline_parallel=4).bubble == pytest.approx(time_of().bubble / 4)


def test_twice_the_batch_takes_twice_the_work_and_the_same_bubble():
    one, two = time_of(), time_of(global_batch_size=512)
    for part in ("matrices", "attention", "passes", "head", "tensor"):
        assert getattr(two, part) == pytest.approx(2 * getattr(one, part))
    assert two.bubble == pytest.approx(one.bubble) and two.optimizer == one.optimizer


def test_a_better_cluster_is_faster_in_the_part_that_is_better():
    h100 = CLUSTERS["h100"]
    for change, part in (("nvlink_gb_s", "tensor"), ("memory_tb_s", "passes"), ("bf16_tflops", "matrices")):
        better = replace(h100, **{change: 2 * getattr(h100, change)})
        assert getattr(cost_of(SHAPE, LAYOUT, better), part) < 0.8 * getattr(time_of(), part), change
    slow = replace(h100, network_gb_s=0.5)
    assert cost_of(SHAPE, LAYOUT, slow).data > 10 * time_of().data
    assert cost_of(SHAPE, LAYOUT, slow).transfers > 10 * time_of().transfers


def test_fp8_needs_hardware_that_has_it():
    assert time_of(precision="fp8").matrices < 0.8 * time_of().matrices
    with pytest.raises(ValueError, match="A100 80GB SXM has no 8-bit matrix products"):
        time_of(cluster="a100", precision="fp8")
