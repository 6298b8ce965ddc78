"""Documents packed into one sample learn what each would alone in its own sample."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cases import build_trainer, spread_norms
from test_layouts import BASE, ORDERS, SP, fast_or_slow
from whole import gather, relative_errors

from megachameleon.data.samples import Sample, stack
from megachameleon.parallel.context import parallel_context

LENGTHS = (5, 21, 2, 30)
"""Document borders at 5, 26 and 28 of 64 positions: inside the pieces of ranks, not between them."""


def two_steps(config, form):
    """Reports of two steps and the final parameters, on one packed sample (`packed`), on its documents one by one
    (`apart`), or on the packed sample with its documents declared to be one (`stream`)."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        vocabulary, random = trainer.data.vocabulary, np.random.default_rng(3)
        documents = [random.integers(vocabulary.text_start, vocabulary.size, length) for length in LENGTHS]
        pieces = [[document] for document in documents] if form == "apart" else [documents]
        samples = [Sample.from_pieces(each, config.data.sequence_length, vocabulary) for each in pieces]
        if form == "stream":
            places = np.arange(config.data.sequence_length)
            samples = [replace(samples[0], document_ids=np.zeros_like(samples[0].document_ids), position_ids=places)]
        listed = SimpleNamespace(batch=lambda positions: stack([samples[position] for position in positions]))
        reports = [train_step(trainer.state, listed, config, context, step=step, consumed=0) for step in range(2)]
        return [(report.losses.loss, report.grad_norm) for report in reports], gather(
            trainer.state.model, context, gradients=False
        )


@pytest.fixture(scope="module")
def alone(workers, module_config):
    cache = {}

    def get(order):
        if order not in cache:
            config = module_config(*BASE, *ORDERS[order], "training.global_batch_size=4", "training.micro_batch_size=1")
            cache[order] = workers.run(1, two_steps, config, "apart")[0]
        return cache[order]

    return get


def packed(workers, module_config, world_size, *overrides, form="packed"):
    batch = ["training.global_batch_size=1", "training.micro_batch_size=1"]
    return workers.run(world_size, two_steps, module_config(*BASE, *batch, *overrides), form)[-1]


LAYOUTS = [
    (1, ""),
    (1, "recompute=selective"),
    (1, "recompute=full"),
    (2, SP),
    (2, "context_parallel=2"),
    (2, "pipeline_parallel=2"),
    (4, "context_parallel=4"),
    (2, "context_parallel=2 recompute=full"),
    (4, f"context_parallel=2 {SP} recompute=full"),
    (4, f"context_parallel=2 {SP} recompute=selective"),
    (8, f"context_parallel=4 {SP} recompute=selective"),
]


@pytest.mark.parametrize(
    ("world_size", "parallel", "order"),
    fast_or_slow(
        [(*layout, order) for layout in LAYOUTS for order in ORDERS],
        {(*LAYOUTS[i], "pre") for i in (0, 1, 2, 3, 4)} | {(*LAYOUTS[8], "swin")},
    ),
)
def test_packed_documents_learn_what_each_would_alone(workers, module_config, alone, world_size, parallel, order):
    overrides = [f"parallel.{setting}" for setting in parallel.split()]
    reports, parameters = packed(workers, module_config, world_size, *ORDERS[order], *overrides)
    expected_reports, expected = alone(order)
    for got, wanted in zip(reports, expected_reports, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert max(relative_errors(parameters, expected).values()) < 1e-5


@pytest.mark.parametrize("parallel", ["", "context_parallel=2"], ids=["one process", "CP2"])
def test_without_isolation_they_are_one_stream(workers, module_config, alone, parallel):
    overrides = [*ORDERS["pre"], *(f"parallel.{setting}" for setting in parallel.split())]
    world_size = 2 if parallel else 1
    reports, parameters = packed(workers, module_config, world_size, *overrides, "data.isolate_documents=false")
    assert reports[0][1] != pytest.approx(alone("pre")[0][0][1], rel=1e-3)
    expected_reports, expected = packed(workers, module_config, 1, *ORDERS["pre"], form="stream")
    for got, wanted in zip(reports, expected_reports, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert max(relative_errors(parameters, expected).values()) < 1e-5
