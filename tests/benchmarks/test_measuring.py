"""Interleaving, statistics, parking and arithmetic of the comparison of training steps."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch

from benchmarks.batches import RandomSamples
from benchmarks.measuring import Plan, Spread, Timing, by_round, interleave, order_of, ratios
from benchmarks.parking import Parking
from benchmarks.same_weights import Weights, require_same_loss
from benchmarks.shapes import PRESETS, Shape, peak_flops

CPU = torch.device("cpu")


class Recorder:
    """A contestant that only notes when it was called."""

    title, same_function = "recorder", True

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def load(self, weights):
        pass

    def step(self, number):
        self.calls.append((self.name, number))
        return float(number)


def timing(name, number, seconds):
    return Timing(
        contestant=name, round=number, wall_seconds=seconds, cpu_seconds=seconds / 2, loss=1.0, peak_bytes=None
    )


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_each_follows_each_other_equally_often(count):
    names = list("abcdef"[:count])
    rounds = [order_of(names, number) for number in range(count * (1 + count % 2))]
    for place in range(count):
        assert set(Counter(order[place] for order in rounds).values()) == {len(rounds) // count}
    pairs = Counter(pair for order in rounds for pair in pairwise(order))
    assert len(pairs) == count * (count - 1)
    assert len(set(pairs.values())) == 1


def test_warm_up_and_settling_do_not_count():
    calls = []
    contestants = {name: Recorder(name, calls) for name in "abc"}
    plan = Plan(rounds=2, warmup=1, steps_per_turn=2, settle=1)
    timings = interleave(contestants, plan, CPU, Parking(CPU, enabled=False))
    assert [name for name, _ in calls[::3]] == [n for number in (-1, 0, 1) for n in order_of(list("abc"), number)]
    assert [number for name, number in calls if name == "a"] == list(range(1, 10))  # every step another batch
    counted = [(t.round, t.loss) for t in timings if t.contestant == "a"]
    assert counted == [(0, 5.0), (0, 6.0), (1, 8.0), (1, 9.0)]  # the first of each turn only settles


def test_ratios_are_paired_by_round():
    timings = [timing("a", 0, 1.0), timing("a", 1, 10.0), timing("b", 1, 30.0), timing("b", 0, 2.0)]
    assert list(ratios(timings, "b", "a", lambda t: t.wall_seconds)) == [2.0, 3.0]
    timings += [timing("a", 1, 12.0), timing("a", 1, 11.0)]
    assert by_round(timings, "a", lambda t: t.cpu_seconds) == [0.5, 5.5]


def test_spread():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.least, spread.low_quartile, spread.median, spread.high_quartile, spread.most) == (1, 2, 3, 4, 5)
    assert Spread.of([7.0]).median == Spread.of([7.0]).high_quartile == 7.0


@pytest.mark.parametrize(
    ("preset", "parameters", "causal", "full"),
    [("0.56b", 0.56, 3.51, 4.14), ("1.48b", 1.48, 9.30, 10.51), ("2.24b", 2.24, 13.94, 15.45)],
)
def test_arithmetic_of_the_presets(preset, parameters, causal, full):
    """Parameters in billions, GFLOP a token: worked out by hand."""
    shape = PRESETS[preset]
    assert shape.parameters / 1e9 == pytest.approx(parameters, abs=0.005)
    assert shape.flops_per_token(causal=True) / 1e9 == pytest.approx(causal, abs=0.005)
    assert shape.flops_per_token(causal=False) / 1e9 == pytest.approx(full, abs=0.005)


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("AMD EPYC") is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"heads": 3}, "--hidden 64"), ({"kv_groups": 3}, "--heads 4"), ({"vocab": 32}, "--vocab 32")],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    values = {"layers": 1, "hidden": 64, "heads": 4, "kv_groups": 2, "ffn": 96, "vocab": 256, **sizes}
    with pytest.raises(ValueError, match=message):
        Shape(**values).validate()


def test_weights_do_not_depend_on_the_order_of_asking():
    shape = Shape(layers=1, hidden=8, heads=2, kv_groups=1, ffn=16, vocab=64, sequence_length=4)
    one, other = Weights(shape, 1, CPU), Weights(shape, 1, CPU)
    first = one["0.q"]
    other["head"]
    torch.testing.assert_close(other["0.q"], first, rtol=0, atol=0)
    assert one["0.k"].shape == (4, 8)
    assert not torch.equal(one["0.q_norm"], one["0.k_norm"])


def test_too_many_documents_are_refused():
    with pytest.raises(ValueError, match="--documents: 600 must be between 1 and 512"):
        RandomSamples(PRESETS["cpu"], 600, 0)


def test_other_functions_are_refused():
    require_same_loss({"ours": 5.0, "plain": 5.00005}, "fp32")
    with pytest.raises(ValueError, match=r"plain computes 5\.0+ and ours 5\.001"):
        require_same_loss({"ours": 5.001, "plain": 5.0}, "fp32")
    with pytest.raises(ValueError, match="not the same model"):
        require_same_loss({"ours": float("nan"), "plain": 5.0}, "fp32")


def test_parked_models_train_as_if_they_had_stayed():
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    parking = Parking(CPU, enabled=True)
    with parking.building("parked"):
        model, optimizer = build()
        view = model.weight.data.view(-1)[4:]
        train(model, optimizer)
    assert parking.kept_bytes["parked"] >= 3 * 20 * 4  # weights and two moments
    assert model.weight.untyped_storage().nbytes() == 0
    with parking.turn_of("parked"):
        train(model, optimizer)
        assert torch.equal(view, model.weight.data.flatten()[4:])
        parked = copy.deepcopy(model.weight.data)
    other, other_optimizer = build()
    train(other, other_optimizer)
    train(other, other_optimizer)
    assert torch.equal(parked, other.weight.data)
    assert model.weight.untyped_storage().nbytes() == 0
