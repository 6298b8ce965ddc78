"""A rank on fake tensors sends and allocates what a real process does."""

import pytest
import torch
from counting_cases import count_real_steps

from megachameleon.config import load_config
from megachameleon.planning import fake_step
from megachameleon.planning.counting import Watch
from megachameleon.planning.fake_step import count_rank

INTERLEAVED = "pipeline_parallel=2 virtual_pipeline_parallel=2"
SP = "tensor_parallel=2 sequence_parallel=true"
OVERLAP = "distributed_optimizer=true overlap_grad_reduce=true overlap_param_gather=true bucket_size=3000"
LAYOUTS = {
    # processes, settings of `parallel`
    "TP2-SP": (2, SP),
    "PP2-VPP2-overlap": (2, f"{INTERLEAVED} {OVERLAP}"),
    "DP2-overlap": (2, OVERLAP),
    "CP2": (2, "context_parallel=2"),
    "recompute norms": (1, "recompute=selective recompute_modules=[layernorm]"),
    "TP2": (2, "tensor_parallel=2"),
    "PP2": (2, "pipeline_parallel=2"),
    "DP2": (2, ""),
    "CP2-distributed-full": (2, "context_parallel=2 distributed_optimizer=true recompute=full"),
    "TP2-SP-PP2": (4, f"{SP} pipeline_parallel=2"),
    "PP2-DP2-distributed": (4, "pipeline_parallel=2 distributed_optimizer=true"),
    "TP2-SP-PP2-VPP2-DP2-overlap": (8, f"{SP} {INTERLEAVED} {OVERLAP}"),
}
STATE = 64 * 2 * 32 * 4 + 1_000
"""Bytes of one hidden state of a micro-batch, and of the sums that all micro-batches leave."""
QUICK = list(LAYOUTS)[:5]


def configuration(settings, *others):
    base = ["model.num_layers=4", "model.norm_order=pre", "training.global_batch_size=16"]
    return load_config("debug", [*base, *(f"parallel.{setting}" for setting in settings.split()), *others])


@pytest.mark.parametrize(
    "layout", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS if x not in QUICK)]
)
def test_a_fake_rank_does_what_a_real_one_does(workers, layout):
    """Messages to the byte, although the fake rank runs fewer micro-batches and continues the line; memory to a
    hidden state, because real messages hold their tensors until they have ended."""
    world, settings = LAYOUTS[layout]
    config = configuration(settings)
    for rank, (peak, traffic) in enumerate(workers.run(world, count_real_steps, config)):
        fake = count_rank(config, rank, world, like_cuda=False)
        assert fake.traffic == traffic
        assert fake.total == pytest.approx(sum(peak.values()), rel=0.03)
        for part in ("weights", "gradients", "optimizer"):
            assert fake.peak[part] == peak[part], part
        for part in ("activations", "head"):
            assert fake.peak.get(part, 0) == pytest.approx(peak.get(part, 0), abs=STATE), part


def test_a_step_continues_the_line_of_shorter_ones(monkeypatch):
    config = configuration("pipeline_parallel=2 virtual_pipeline_parallel=2", "training.global_batch_size=20")
    short = count_rank(config, 0, 2)
    monkeypatch.setattr(fake_step, "_steps_to_run", lambda config, world: ([10], 1))
    whole = count_rank(config, 0, 2)
    assert short.traffic == whole.traffic
    assert short.total == pytest.approx(whole.total, rel=0.02)  # one more transfer in flight, small in a real model


def test_only_the_model_is_built_where_no_step_is_asked_for():
    count = count_rank(configuration(""), 0, 1, train=False)
    assert count.traffic == {}
    assert set(count.peak) == {"weights"}


@pytest.mark.parametrize("rank", [-1, 4])
def test_there_must_be_such_a_rank(rank):
    with pytest.raises(ValueError, match=rf"--rank: {rank} is not one of the 4 processes; take 0 to 3"):
        count_rank(configuration(""), rank, 4)


def test_a_storage_counts_once_until_it_dies():
    with Watch({}, pretend=False) as watch:
        whole = torch.zeros(100)
        part = whole[:10].view(2, 5)
        with watch.part("head"):
            other = torch.zeros(50)
        assert watch.memory.live == {"buffers": 400, "head": 200}
        del whole
        assert watch.memory.live["buffers"] == 400
        del part
        assert watch.memory.live["buffers"] == 0
        other.untyped_storage().resize_(40)
        assert watch.memory.live["head"] == 40
        assert watch.memory.peak == {"buffers": 400, "head": 200}
