"""Dropout and recomputation: what is dropped where, again and again the same, and remembered by recomputation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import build_trainer, train_steps
from test_layouts import BASE, INTERLEAVED, ORDERS, OVERLAP, SP, fast_or_slow
from torch.overrides import TorchFunctionMode

from megachameleon.parallel.context import parallel_context

PROBABILITY = 0.25
DROPOUT = f"model.dropout={PROBABILITY}"


def settings(parallel):
    return [f"parallel.{setting}" for setting in parallel.split()]


def masks_of_two_steps(config):
    """What each dropout of this rank has dropped, bool [s, b, h], in the order of the calls."""
    from megachameleon.training.step import train_step

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is F.dropout and (kwargs or {}).get("p", 0) > 0:
                assert args[0].ne(0).all()
                masks.append(result == 0)
            return result

    masks = []
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        with Recorder():
            for step in range(2):
                consumed = step * config.training.global_batch_size
                train_step(trainer.state, trainer.data.train, config, context, step=step, consumed=consumed)
    return masks


def require_independent(one, other):
    """Two masks that know nothing of each other agree at p^2 + (1-p)^2 of their places; five sigma are allowed."""
    expected = PROBABILITY**2 + (1 - PROBABILITY) ** 2
    sigma = math.sqrt(expected * (1 - expected) / one.numel())
    assert abs(float((one == other).double().mean()) - expected) < 5 * sigma


@pytest.mark.parametrize(
    ("parallel", "same"),
    [
        ("", False),
        ("context_parallel=2", False),
        ("pipeline_parallel=2", False),
        (SP, False),
        ("tensor_parallel=2", True),
    ],
    ids=["DP2", "CP2", "PP2", "TP2-SP", "TP2"],
)
def test_masks_agree_where_activations_are_replicated_and_only_there(workers, module_config, parallel, same):
    config = module_config(*BASE, DROPOUT, *settings(parallel))
    first, second = workers.run(2, masks_of_two_steps, config)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        if same:
            assert torch.equal(one, other)
        else:
            require_independent(one, other)
    for one, other in itertools.combinations(first[:4] + first[-4:], 2):  # layers, micro-batches and steps
        require_independent(one, other)
    everything = torch.cat([mask.flatten() for mask in first]).double()
    sigma = math.sqrt(PROBABILITY * (1 - PROBABILITY) / everything.numel())
    assert abs(float(everything.mean()) - PROBABILITY) < 4 * sigma


def test_masks_of_tensor_and_context_ranks_together(workers, module_config):
    """Tensor ranks are neighbours; context ranks are two apart."""
    config = module_config(*BASE, DROPOUT, *settings("tensor_parallel=2 context_parallel=2"))
    a, b, c, d = (masks[0] for masks in workers.run(4, masks_of_two_steps, config))
    assert torch.equal(a, b) and torch.equal(c, d)
    require_independent(a, c)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    fast_or_slow(
        [
            (1, ""),
            (2, OVERLAP),
            (2, SP),
            (2, "context_parallel=2"),
            (2, INTERLEAVED),
            (8, f"{SP} {INTERLEAVED} {OVERLAP}"),
        ],
        {(2, SP), (2, OVERLAP)},
    ),
    ids=["one process", "DP2-overlap", "TP2-SP", "CP2", "PP2-VPP2", "TP2-SP-PP2-VPP2-DP2-overlap"],
)
def test_a_run_repeats_bit_for_bit(workers, module_config, world_size, parallel):
    config = module_config(*BASE, DROPOUT, *settings(parallel))
    first, again = (workers.run(world_size, train_steps, config, 2)[0] for _ in range(2))
    assert first[0] == again[0]
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    other = workers.run(
        world_size, train_steps, module_config(*BASE, DROPOUT, *settings(parallel), "training.seed=7"), 1
    )
    assert first[0][0] != other[0][0][0]


def test_tensor_parallel_ranks_drop_what_one_process_drops(workers, module_config):
    """Without sequence parallelism the branch outputs are replicated, and so must be what is dropped of them."""
    from whole import relative_errors

    one = workers.run(1, train_steps, module_config(*BASE, DROPOUT), 2)[0]
    two = workers.run(2, train_steps, module_config(*BASE, DROPOUT, "parallel.tensor_parallel=2"), 2)[0]
    assert max(relative_errors(two[2], one[2]).values()) < 1e-5


RECOMPUTED = [
    (parallel, kind, order)
    for parallel in ("", SP, INTERLEAVED, "context_parallel=2")
    for kind in ("selective", "full")
    for order in ORDERS
]


@pytest.mark.parametrize(
    ("parallel", "kind", "order"),
    fast_or_slow(RECOMPUTED, {*RECOMPUTED[:4], (SP, "full", "pre"), (INTERLEAVED, "selective", "swin")}),
)
def test_recomputation_changes_no_bit(workers, module_config, parallel, kind, order):
    world_size = 2 if parallel else 1
    base = [*BASE, DROPOUT, *ORDERS[order], *settings(parallel)]
    kept = workers.run(world_size, train_steps, module_config(*base), 2)[-1]
    again = workers.run(world_size, train_steps, module_config(*base, f"parallel.recompute={kind}"), 2)[-1]
    assert kept[0] == again[0]
    assert all(torch.equal(kept[2][name], again[2][name]) for name in kept[2])


def calls_in_a_step(config):
    """How often the parts of a block and the final norm go forward in one step of one micro-batch."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        decoder = trainer.state.model[0].module.decoder
        layer, counts = decoder.layers[0], {}
        parts = {"norm": layer.input_layernorm, "attention": layer.self_attention, "mlp": layer.mlp.linear_fc1}
        for name, part in {**parts, "final norm": decoder.final_layernorm}.items():
            part.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        train_step(trainer.state, trainer.data.train, config, context, step=0, consumed=0)
        return counts


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (["none"], {"norm": 1, "attention": 1, "mlp": 1}),
        (["selective"], {"norm": 2, "attention": 1, "mlp": 2}),
        (["selective", "parallel.recompute_modules=[layernorm]"], {"norm": 2, "attention": 1, "mlp": 1}),
        (["selective", "parallel.recompute_modules=[mlp]"], {"norm": 1, "attention": 1, "mlp": 2}),
        (["full"], {"norm": 2, "attention": 2, "mlp": 2}),
    ],
    ids=["none", "selective", "norms", "mlp", "full"],
)
def test_what_is_recomputed(workers, module_config, recompute, expected):
    config = module_config(*BASE, f"parallel.recompute={recompute[0]}", *recompute[1:], "training.micro_batch_size=8")
    assert workers.run(1, calls_in_a_step, config)[0] == {**expected, "final norm": 1}
