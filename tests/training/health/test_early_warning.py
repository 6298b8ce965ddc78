"""Early warning on synthetic series: lost hold is told before it is large, what settles is let alone."""

import math
import random
from itertools import pairwise

import pytest
from synthetic_reports import event_of, through_json

from megachameleon.config.health import HealthConfig
from megachameleon.training.health.build import build_guards
from megachameleon.training.health.early_warning import EarlyWarning
from megachameleon.training.health.growth import MOST_ENTRIES, GrowthTrend, first_alarm

WARMUP = 50


def warning(policy="log"):
    return EarlyWarning(HealthConfig(early_warning=policy), warmup_steps=WARMUP)


def settling(step, draw):
    """A norm that rises in warm-up and then as the logarithm of the step, with 10 % of noise at each."""
    return (2 + 8 * min(step / WARMUP, 1) + math.log(step)) * math.exp(draw.gauss(0, 0.1))


def follow(guard, norms, *, log_z=lambda step: 6.0, start=1):
    """Verdicts that say something, by step; `norms` gives (text, image) of a step."""
    told = {}
    for step, (text, image) in enumerate(norms, start):
        monitors = {"output_norm": 1.0, "output_norm/text": text, "output_norm/image": image}
        verdict = guard.judge(event_of(step, 3.0, log_z=log_z(step), monitors=monitors))
        if verdict.reason:
            told[step] = verdict
    return told


def norms_of(steps, image, seed=0):
    draw = random.Random(seed)
    return [(settling(step, draw), image(step) * math.exp(draw.gauss(0, 0.1))) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("growth", "by"),
    [
        (lambda step: 10 * math.exp(max(step - 400, 0) / 100), 600),
        (lambda step: 10 * (1 + max(step - 400, 0) / 20), 520),
        (lambda step: 10.0 if step < 400 else 60.0, 440),
        (lambda step: 10 * (max(step, 100) / 100) ** 2.5, 400),
    ],
    ids=["exponential", "linear", "at once", "a power of the step"],
)
def test_norms_that_lose_their_hold_are_told_early(growth, by):
    told = follow(warning(), norms_of(800, growth))
    assert told and min(told) <= by
    first = told[min(told)]
    assert first.action == "continue" and "output_norm/image grew" in first.reason and "text" not in first.reason


def test_norms_that_settle_are_let_alone():
    """20 runs of 10,000 steps with a tenth of noise: not one alarm."""
    draws = [random.Random(seed) for seed in range(20)]
    for draw in draws:
        values = [math.log(settling(step, draw)) for step in range(WARMUP + 1, 10_001)]
        assert first_alarm(values, math.log(2)) is None, "not even at half the limit"


def test_a_guard_lets_an_ordinary_run_alone():
    draw = random.Random(3)
    norms = [(settling(step, draw), settling(step, draw)) for step in range(1, 2001)]
    assert not follow(warning(), norms, log_z=lambda step: 6 + math.log(step) / 8 + draw.gauss(0, 0.1))


def test_warm_up_and_skipped_steps_are_not_judged():
    assert not follow(warning(), [(1e-3 * 1.2**step, 1.0) for step in range(WARMUP + 1)])
    early = EarlyWarning(HealthConfig(early_warning_after=10), warmup_steps=WARMUP)
    assert min(follow(early, [(1e-3 * 1.2**step, 1.0) for step in range(WARMUP + 30)])) < WARMUP + 10
    guard = warning()
    guard.judge(event_of(WARMUP + 1, math.nan, monitors={"output_norm/text": 1e9}))
    assert not guard.alarms


def test_values_that_are_not_finite_are_left_out():
    guard = warning()
    assert not follow(guard, [(math.inf, math.nan)] * 200)
    assert set(guard.alarms) == {"log_z"}


def test_log_z_that_drifts_is_told_in_either_direction():
    for sign in (1, -1):
        told = follow(warning(), [(5.0, 5.0)] * 600, log_z=lambda step, sign=sign: sign * (1 + max(step - 300, 0) / 30))
        assert 380 < min(told) < 460 and "log Z moved by 3" in told[min(told)].reason


def test_alarms_come_again_only_after_as_much_growth_again():
    told = follow(warning(), norms_of(900, lambda step: 10 * math.exp(max(step - 100, 0) / 100)))
    steps = sorted(told)
    assert 2 <= len(steps) <= 6, "e^8 is less than 4^6"
    assert min(b - a for a, b in pairwise(steps)) > 100


@pytest.mark.parametrize("policy", ["lower_lr", "rollback", "stop"])
def test_policies_act(policy):
    told = follow(warning(policy), norms_of(600, lambda step: 10 * math.exp(max(step - 100, 0) / 50)))
    assert {verdict.action for verdict in told.values()} == {policy}
    assert all(verdict.since < step for step, verdict in told.items())


def test_more_growth_may_be_allowed():
    norms = [(5.0, 5.0)] * 200 + [(5.0, 24.0)] * 100
    assert follow(warning(), norms)
    patient = EarlyWarning(HealthConfig(early_warning_growth=5.0), warmup_steps=WARMUP)
    assert not follow(patient, norms)
    with pytest.raises(ValueError, match=r"early_warning_growth: 1\.0"):
        HealthConfig(early_warning_growth=1.0).validate()


def test_off_says_nothing():
    assert not follow(warning("off"), norms_of(600, lambda step: 10 * math.exp(step / 50)))


def test_a_resumed_run_warns_alike():
    norms = norms_of(700, lambda step: 10 * math.exp(max(step - 300, 0) / 90))
    whole = warning()
    expected = follow(whole, norms)
    assert expected
    for cut in (20, 90, 333, 480):
        first = warning()
        before = follow(first, norms[:cut])
        second = through_json(first, warning())
        assert {**before, **follow(second, norms[cut:], start=cut + 1)} == expected
        assert second.state_dict() == whole.state_dict()


def test_the_past_of_a_long_run_stays_small():
    trend = GrowthTrend()
    for step in range(50_000):
        trend.add(float(step))
    assert len(trend.past) < MOST_ENTRIES and len(trend.pending) < trend.span
    assert trend.growth() == pytest.approx(25_000, rel=0.1), "from half of the past to now"
    assert trend.past == sorted(trend.past)


def test_acting_needs_the_norms(config):
    with pytest.raises(ValueError, match=r"health\.early_warning: stop .*logging\.monitors"):
        build_guards(config("health.early_warning=stop", "logging.monitors=[]"))
    assert len(build_guards(config("logging.monitors=[]"))) == 2
