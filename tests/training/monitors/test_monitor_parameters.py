"""Gradient norms and update ratios by group, against gradients and weights themselves."""

import math

import pytest
from cases import build_trainer, spread_norms
from monitor_cases import measured_steps, own_model

from megachameleon.parallel.context import parallel_context
from megachameleon.training.agreement import StepLimits
from megachameleon.training.monitors.parameter_groups import GROUPS, group_of

OF_PARAMETERS = "logging.monitors=[gradient_norms, update_ratios]"


def weights_around_a_step(config, steps=2, limit=math.inf):
    """Reports of some steps; of the last, group by parameter, its gradient's square, its weight before and after."""
    from megachameleon.checkpoint.state import unwrap
    from megachameleon.model.initialization import global_names
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        names = dict(global_names(unwrap(trainer.state.model[0])))
        reports, gradients = [], {}
        trainer.monitors[0].after_backward = lambda state: gradients.update(
            {name: float(parameter.main_grad.double().square().sum()) for name, parameter in names.items()}
        )
        for step in range(steps):
            before = {name: parameter.detach().double().clone() for name, parameter in names.items()}
            arguments = (trainer.state, trainer.data.train, trainer.config, context)
            limits = StepLimits(loss=limit if step == steps - 1 else math.inf)
            report = train_step(*arguments, step=step, consumed=8 * step, monitors=trainer.monitors, limits=limits)
            reports.append(report)
        moved = {
            name: (
                float((parameter.detach().double() - before[name]).square().sum()),
                float(before[name].square().sum()),
            )
            for name, parameter in names.items()
        }
        return reports, gradients, moved


def by_group(values):
    totals = dict.fromkeys(GROUPS, 0.0)
    for name, value in values.items():
        totals[GROUPS[group_of(name)]] += value
    return totals


@pytest.mark.parametrize("order", ["pre", "swin"])
def test_they_are_those_of_the_weights(workers, module_config, order):
    config = module_config(*own_model(OF_PARAMETERS, f"model.norm_order={order}"))
    reports, gradients, moved = workers.run(1, weights_around_a_step, config)[0]
    measured, num_tokens = reports[-1].monitors, reports[-1].losses.num_tokens
    for group, square in by_group(gradients).items():
        assert measured[f"gradient_norm/{group}"] == pytest.approx(math.sqrt(square) / num_tokens, rel=1e-5)
    updates, weights = (by_group({name: pair[i] for name, pair in moved.items()}) for i in (0, 1))
    for group in GROUPS:
        ratio = math.sqrt(updates[group] / weights[group])
        assert measured[f"update_ratio/{group}"] == pytest.approx(ratio, rel=1e-3)
    whole = math.sqrt(sum(measured[f"gradient_norm/{group}"] ** 2 for group in GROUPS))
    assert whole == pytest.approx(reports[-1].grad_norm, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_left_out_moved_nothing(workers, module_config, steps):
    """At the first step Adam has no moments yet."""
    reports, _, _ = workers.run(1, weights_around_a_step, module_config(*own_model(OF_PARAMETERS)), steps, 1e-3)[0]
    assert reports[-1].skipped
    assert {reports[-1].monitors[f"update_ratio/{group}"] for group in GROUPS} == {0.0}


def test_bf16_weights_are_judged_by_their_masters(workers, module_config):
    """Updates that are lost in bf16 weights are not lost in their fp32 masters."""
    fp32, bf16 = (
        workers.run(1, measured_steps, module_config(*own_model(OF_PARAMETERS, f"training.precision={precision}")))[0]
        for precision in ("fp32", "bf16")
    )
    for group in GROUPS:
        assert bf16[1][f"update_ratio/{group}"] == pytest.approx(fp32[1][f"update_ratio/{group}"], rel=0.05)


def test_pieces_make_no_difference(workers, module_config):
    whole = workers.run(1, measured_steps, module_config(*own_model(OF_PARAMETERS)))[0]
    pieces = workers.run(1, measured_in_small_pieces, module_config(*own_model(OF_PARAMETERS)))[0]
    assert pieces[1] == pytest.approx(whole[1], rel=1e-6)


def measured_in_small_pieces(config):
    from megachameleon.training.monitors import update_ratios

    usual, update_ratios.PIECE = update_ratios.PIECE, 100
    try:
        return measured_steps(config)
    finally:
        update_ratios.PIECE = usual
