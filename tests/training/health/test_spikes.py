"""Spikes on synthetic series: found, named, answered by policy; and ordinary noise is let alone."""

import math
import random
from dataclasses import replace

import pytest
from synthetic_reports import BATCH, event_of, judge_all, through_json

from megachameleon.config.health import HealthConfig
from megachameleon.training.agreement import StepLimits
from megachameleon.training.health.spikes import SpikeGuard, upper_limit


def guard_of(*, stage_ends=(), batch_size=BATCH, **settings):
    return SpikeGuard(HealthConfig(**settings), batch_size=batch_size, stage_ends=stage_ends, look_up="show")


def ordinary(steps, seed=0, *, level=3.0, start=4.0):
    """(loss, gradient norm) of a run that learns: exponential fall plus noise, log-normal norms with a heavy tail."""
    draw = random.Random(seed)
    for step in range(steps):
        loss = level + start * math.exp(-step / 50) + draw.gauss(0, 0.05)
        yield loss, math.exp(draw.gauss(0, 0.25) * (2 if draw.random() < 0.02 else 1))


def test_limit_is_the_median_plus_robust_deviations():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3; deviations 2, 1, 0, 1, 97: median 1
    assert upper_limit(values, 5, least=0.0) == pytest.approx(3 + 5 * 1.4826)
    assert upper_limit([2.0] * 9, 10, least=0.05) == pytest.approx(2.5)


@pytest.mark.parametrize(("loss", "norm", "named"), [(6.0, 1.0, "loss 6 "), (3.0, 500.0, "gradient norm 500 ")])
def test_a_spike_is_kept_from_the_weights_and_named_with_its_samples(loss, norm, named):
    guard = guard_of()
    assert not any(verdict.reason for verdict in judge_all(guard, ordinary(300)))
    event = event_of(301, loss, norm, limits=guard.limits())
    assert event.report.skipped is not None
    verdict = guard.judge(event)
    assert verdict.action == "continue"
    assert verdict.reason.startswith(f"step 301: {named}is beyond ")
    assert "not updated; samples 1200 to 1203 (show 1200)" in verdict.reason
    assert not guard.judge(event_of(302, 3.0, limits=guard.limits())).reason


def test_what_was_left_out_does_not_move_the_limit():
    guard = guard_of(max_skips_in_a_row=100)
    judge_all(guard, ordinary(300))
    before = guard.limits()
    judge_all(guard, [(9.0, 1.0)] * 50)
    assert guard.limits() == before


def test_neither_a_fall_nor_a_slow_rise_is_a_spike():
    for series in (
        [10 - 0.03 * step for step in range(250)],
        [3 + 0.004 * step for step in range(1000)],
        [3.0] * 500,
    ):
        noise = random.Random(1)
        verdicts = judge_all(guard_of(), [(loss + noise.gauss(0, 0.01), 1.0 + loss) for loss in series])
        assert not any(verdict.reason for verdict in verdicts)


def test_false_alarms_on_ordinary_noise_are_rarer_than_one_in_ten_thousand_steps():
    """Normal losses, log-normal gradient norms of which 2 % come from twice the spread: 5 runs of 4,000 steps."""
    reasons = [v.reason for seed in range(5) for v in judge_all(guard_of(), ordinary(4000, seed)) if v.reason]
    assert len(reasons) <= 2, reasons


def test_nothing_is_judged_before_half_a_window():
    guard = guard_of(spike_window=64)
    judge_all(guard, [(3.0, 1.0)] * 31)
    assert guard.limits().loss == math.inf
    judge_all(guard, [(3.0, 1.0)])
    assert guard.limits().loss == pytest.approx(3.3)


def test_many_skips_in_a_row_roll_back():
    guard = guard_of(max_skips_in_a_row=2)
    judge_all(guard, ordinary(300))
    verdicts = [guard.judge(event_of(step, 9.0, limits=guard.limits())) for step in (301, 302, 303)]
    assert [verdict.action for verdict in verdicts] == ["continue", "continue", "rollback"]
    assert verdicts[2].since == 301


def test_skips_apart_from_each_other_do_not_add_up():
    guard = guard_of(max_skips_in_a_row=1)
    judge_all(guard, ordinary(300))
    assert {v.action for v in judge_all(guard, [(9.0, 1.0), (3.0, 1.0)] * 10)} == {"continue"}


def test_rollback_by_policy_comes_at_once():
    guard = guard_of(spike_policy="rollback")
    judge_all(guard, ordinary(300))
    assert judge_all(guard, [(9.0, 1.0)])[0].action == "rollback"


def test_log_updates_says_so_and_takes_a_lasting_level_for_new():
    guard = guard_of(spike_policy="log", max_skips_in_a_row=2)
    judge_all(guard, ordinary(300))
    assert guard.limits().loss == math.inf
    verdicts = judge_all(guard, [(9.0, 1.0)] * 200)
    assert ["updated all the same" in verdict.reason for verdict in verdicts] == [True] * 3 + [False] * 197
    assert "new level" in verdicts[2].reason
    assert {verdict.action for verdict in verdicts} == {"continue"}


def test_off_says_nothing_about_spikes():
    guard = guard_of(spike_policy="off")
    verdicts = judge_all(guard, [*ordinary(300), (99.0, 1e6)])
    assert not any(verdict.reason for verdict in verdicts)


@pytest.mark.parametrize("policy", ["off", "log", "skip"])
def test_what_is_not_finite_stops_the_run_after_some_steps(policy):
    guard = guard_of(spike_policy=policy, max_skips_in_a_row=2)
    judge_all(guard, ordinary(100))
    verdicts = judge_all(guard, [(math.nan, 1.0), (3.0, math.inf), (math.nan, math.nan)])
    assert [verdict.action for verdict in verdicts] == ["continue", "continue", "stop"]
    assert "loss is nan" in verdicts[0].reason and "gradient norm is inf" in verdicts[1].reason
    assert "health.max_skips_in_a_row=2" in verdicts[2].reason


def test_other_data_are_not_measured_by_what_came_before():
    guard = guard_of(stage_ends=(300 * BATCH,))
    verdicts = judge_all(guard, [*ordinary(300), *((loss + 4, norm) for loss, norm in ordinary(300, start=0))])
    assert not any(verdict.reason for verdict in verdicts)
    assert any(v.reason for v in judge_all(guard_of(), [*ordinary(300), (7.0, 1.0)]))


def test_a_resumed_run_judges_alike():
    series = [*ordinary(200), (9.0, 1.0), *ordinary(100, seed=5, start=0), (3.0, 1e3)]
    whole = guard_of()
    expected = judge_all(whole, series)
    for cut in (10, 150, 201, 250):
        first = guard_of()
        judge_all(first, series[:cut])
        second = through_json(first, guard_of())
        rest = [
            second.judge(event_of(cut + i + 1, loss, norm, limits=second.limits()))
            for i, (loss, norm) in enumerate(series[cut:])
        ]
        assert rest == expected[cut:]
        assert second.state_dict() == whole.state_dict()


def test_another_batch_size_starts_a_new_window():
    guard = guard_of()
    judge_all(guard, ordinary(300))
    assert through_json(guard, guard_of(batch_size=8)).limits().loss == math.inf


@pytest.mark.parametrize(
    "setting",
    [{"spike_deviations": 2.0}, {"spike_window": 8}, {"early_warning_after": -1}, {"spike_deviations": math.nan}],
)
def test_impossible_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"health.{next(iter(setting))}"):
        HealthConfig(**setting).validate()


def test_another_batch_size_forgets_what_came_after_the_checkpoint():
    """A roll-back to a checkpoint of another batch size leaves nothing of the steps that are undone."""
    old, guard = guard_of(batch_size=8).state_dict(), guard_of()
    judge_all(guard, [*ordinary(300), (90.0, 1.0)])
    guard.load_state_dict(old)
    assert guard.limits().loss == math.inf and guard.in_a_row == 0


def test_a_batch_without_labels_refuses_no_later_step():
    guard = guard_of()
    judge_all(guard, ordinary(300))
    limits = guard.limits()
    empty = event_of(301, math.nan, 0.0, limits=StepLimits())
    guard.judge(replace(empty, report=replace(empty.report, skipped=None)))
    assert guard.limits() == limits
