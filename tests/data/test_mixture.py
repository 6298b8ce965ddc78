from dataclasses import dataclass
from fractions import Fraction
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachameleon.data.blending.mixture import Stage, sample_weights, whole_numbers


@dataclass(frozen=True)
class Contents:
    labels_per_sample: Fraction
    image_share: Fraction


DATASETS = {
    "text": Contents(Fraction(4000), Fraction(0)),
    "pairs": Contents(Fraction(3000), Fraction(9, 10)),
    "mixed": Contents(Fraction(3500), Fraction(1, 2)),
}


def token_shares(weights):
    tokens = {name: float(weight * DATASETS[name].labels_per_sample) for name, weight in weights.items()}
    return {name: value / sum(tokens.values()) for name, value in tokens.items()}


def image_share(weights):
    return sum(share * float(DATASETS[name].image_share) for name, share in token_shares(weights).items())


def test_weights_by_samples_are_left_alone():
    stage = Stage(None, {"text": 0.5, "pairs": 0.25, "mixed": 0})
    assert sample_weights(stage, DATASETS, "stages[0]") == {"text": Fraction(1, 2), "pairs": Fraction(1, 4)}


def test_weights_by_tokens_count_labels():
    weights = sample_weights(Stage(None, {"text": 0.25, "pairs": 0.75}, by="tokens"), DATASETS, "stages[0]")
    assert token_shares(weights) == pytest.approx({"text": 0.25, "pairs": 0.75}, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries({name: st.floats(0.01, 1) for name in DATASETS}),
    st.floats(0.02, 0.88),
    st.sampled_from(["samples", "tokens"]),
)
def test_a_target_for_picture_tokens_is_met(weights, target, by):
    assert image_share(sample_weights(Stage(None, weights, by, target), DATASETS, "x")) == pytest.approx(
        target, abs=1e-9
    )


def test_a_target_changes_weights_as_little_as_possible():
    """The log of the change is linear in the share of pictures, as the minimum of the relative entropy has it."""
    before = {"text": 0.2, "pairs": 0.5, "mixed": 0.3}
    after = token_shares(sample_weights(Stage(None, before, "tokens", 0.45), DATASETS, "x"))
    tilt = {name: log(after[name] / before[name]) for name in before}
    slope = (tilt["pairs"] - tilt["text"]) / 0.9
    assert tilt["mixed"] == pytest.approx(tilt["text"] + 0.5 * slope, abs=1e-9)
    given = sum(before[name] * float(DATASETS[name].image_share) for name in before)
    assert token_shares(sample_weights(Stage(None, before, "tokens", given), DATASETS, "x")) == pytest.approx(before)


def test_weights_are_the_same_on_every_machine():
    weights = sample_weights(Stage(None, {"text": 0.3, "pairs": 0.7}, "tokens", 0.45), DATASETS, "x")
    assert weights == {"text": Fraction(1, 8000), "pairs": Fraction(1, 6000)}  # exact: no float is involved
    assert whole_numbers(weights) == {"text": 3, "pairs": 4}


@pytest.mark.parametrize("target", [0.0001, 0.9, 0.95])
def test_an_impossible_target_names_what_is_possible(target):
    stage = Stage(None, {"pairs": 1, "mixed": 1}, "tokens", target)
    with pytest.raises(ValueError, match=r"stages\[1\].image_tokens: .* between 0.5000 and 0.9000"):
        sample_weights(stage, DATASETS, "stages[1]")
