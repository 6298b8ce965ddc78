from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megachameleon.data.blending import Blend, BlendedSamples, FirstSamples, Stage, apportion, keyed_permutation
from megachameleon.data.packing import PackedDataset

SIZES = {"text": 70, "pairs": 31, "code": 13}
STAGES = [Stage(150, {"text": 0.6, "pairs": 0.3, "code": 0.1}), Stage(77, {"code": 1, "pairs": 2})]


def draws(blend: Blend, count: int) -> list:
    return [blend[position] for position in range(count)]


def test_random_access_equals_sequential_access_for_any_instance():
    expected = draws(Blend(SIZES, STAGES, seed=5, block_size=16), 227)
    other = Blend(dict(reversed(SIZES.items())), STAGES, seed=5, block_size=16)
    for position in np.random.default_rng(0).permutation(227).tolist():
        assert other[position] == expected[position]
    assert draws(Blend(SIZES, STAGES, seed=6, block_size=16), 227) != expected


def test_ranks_partition_the_same_order():
    expected = draws(Blend(SIZES, STAGES, seed=5, block_size=16), 224)
    for world in (2, 7):
        ranks = [Blend(SIZES, STAGES, seed=5, block_size=16) for _ in range(world)]
        assert [ranks[position % world][position] for position in range(224)] == expected


def test_every_epoch_visits_each_sample_once():
    blend = Blend(SIZES, [*STAGES, Stage(None, {"text": 1, "code": 3})], seed=1, block_size=16)
    orders: dict = {}
    for draw in draws(blend, 600):
        orders.setdefault((draw.dataset, draw.epoch), []).append(draw.index)
    assert max(epoch for name, epoch in orders if name == "code") >= 10
    for (name, epoch), order in orders.items():
        complete = (name, epoch + 1) in orders
        assert len(set(order)) == len(order)
        assert sorted(order) == list(range(SIZES[name])) or not complete
    assert orders["code", 0] != orders["code", 1]


def test_quotas_are_exact_at_block_boundaries_and_near_in_between():
    weights = {"text": 0.6, "pairs": 0.3, "code": 0.1}
    blend = Blend(SIZES, [Stage(None, weights)], seed=1, block_size=50)
    counts: Counter = Counter()
    for position in range(1000):
        counts[blend[position].dataset] += 1
        slack = 0 if position % 50 == 49 else 2
        assert all(abs(counts[name] - weight * (position + 1)) <= slack + 1e-9 for name, weight in weights.items())


@pytest.mark.parametrize("first", [1, 16, 100, 149, 150])
def test_appended_stages_do_not_move_what_came_before(first):
    whole = Blend(SIZES, [Stage(None, STAGES[0].weights)], seed=5, block_size=16)
    cut = Blend(SIZES, [Stage(first, STAGES[0].weights), STAGES[1]], seed=5, block_size=16)
    assert draws(cut, first) == draws(whole, first)
    assert len(set(draws(cut, first + 77))) == first + 77  # nothing is repeated after the cut
    assert whole.history_fingerprint(first) == cut.history_fingerprint(first)
    assert whole.history_fingerprint(first + 1) != cut.history_fingerprint(first + 1)


@pytest.mark.parametrize("name", ["a", "middle", "zebra"])
def test_a_dataset_of_an_appended_stage_does_not_move_what_came_before(name):
    cut = [STAGES[0], Stage(70, STAGES[1].weights)]
    before = Blend(SIZES, cut, seed=5, block_size=16)
    appended = [*cut, Stage(50, {name: 1, "text": 2})]
    after = Blend({**SIZES, name: 9}, appended, seed=5, block_size=16)
    assert draws(after, 220) == draws(before, 220)
    assert after.drawn_before(220) == {**before.drawn_before(220), name: 0}
    assert after.history_fingerprint(220) == before.history_fingerprint(220)
    larger = Blend({**SIZES, name: 10}, appended, seed=5, block_size=16)
    assert after.history_fingerprint(221) != larger.history_fingerprint(221)


def test_drawn_before_counts_the_past():
    blend = Blend(SIZES, STAGES, seed=5, block_size=16)
    counts: Counter = Counter()
    for position in range(227):
        assert blend.drawn_before(position) == {name: counts[name] for name in SIZES}
        counts[blend[position].dataset] += 1
    assert blend.num_samples == 227
    with pytest.raises(IndexError):
        blend[227]


def test_apportion_never_shrinks_even_for_tiny_weights():
    weights = [Fraction(w) for w in (0.5, 1e-4, 0, 0.3, 1e-5, 0.2)]
    previous = [0] * len(weights)
    for count in range(3000):
        current = apportion(weights, count)
        assert sum(current) == count and all(a >= b for a, b in zip(current, previous, strict=True))
        assert all(abs(n - count * w / sum(weights)) <= 1.5 for n, w in zip(current, weights, strict=True))
        previous = current


@pytest.mark.parametrize("size", [1, 2, 3, 10, 257, 1000])
def test_keyed_permutation_is_a_bijection(size):
    assert sorted(keyed_permutation(i, size, key=7) for i in range(size)) == list(range(size))


def test_keyed_permutation_reaches_far_without_memory():
    size = 10**10
    reached = {keyed_permutation(i, size, key=3) for i in range(2000)}
    assert len(reached) == 2000 and max(reached) > 0.99 * size


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([Stage(None, {"text": 1}), Stage(5, {"text": 1})], "only the last"),
        ([Stage(5, {"txt": 1})], "did you mean 'text'"),
        ([Stage(5, {"text": -1})], "at least 0"),
        ([Stage(5, {"text": float("nan")})], "finite"),
        ([Stage(5, {"text": 0})], "all zero"),
        ([Stage(0, {"text": 1})], "num_samples=0"),
        ([Stage(5, {"empty": 1})], "no samples"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Blend({**SIZES, "empty": 0}, stages, seed=0)


def test_blended_samples_come_from_their_datasets(tmp_path, make_document, write_shard):
    datasets = {}
    for number, name in enumerate(("a", "b")):
        documents = [make_document(6, 0, seed=100 * number + i) for i in range(12)]
        datasets[name] = PackedDataset(write_shard(tmp_path / name, documents), 15, seed=0)
    blended = BlendedSamples.of(datasets, [Stage(None, {"a": 1, "b": 1})], seed=3)
    for position in range(30):
        draw = blended.blend[position]
        assert np.array_equal(blended[position].tokens, datasets[draw.dataset][draw.index].tokens)
    longer = {**datasets, "b": PackedDataset(datasets["b"].dataset, 16, seed=0)}
    with pytest.raises(ValueError, match="sequence_length=15"):
        BlendedSamples.of(longer, [Stage(None, {"a": 1})], seed=3)
    first = FirstSamples(datasets["a"], 3)
    assert len(first) == 3 and np.array_equal(first[2].tokens, datasets["a"][2].tokens)
    assert len(FirstSamples(datasets["a"], 999)) == len(datasets["a"])


def test_the_history_is_of_the_datasets_that_were_drawn_from(tmp_path, make_document, write_shard):
    def dataset(folder, seed):
        return PackedDataset(write_shard(tmp_path / folder, [make_document(6, seed=seed + i) for i in range(9)]), 15, 0)

    a, b, other = dataset("a", 0), dataset("b", 50), dataset("c", 100)
    first, second = Stage(6, {"a": 1}), Stage(None, {"a": 1, "b": 1})
    alone = BlendedSamples.of({"a": a}, [first], seed=3)
    appended = BlendedSamples.of({"a": a, "b": b}, [first, second], seed=3)
    changed = BlendedSamples.of({"a": a, "b": other}, [first, second], seed=3)
    assert alone.history_fingerprint(6) == appended.history_fingerprint(6) == changed.history_fingerprint(6)
    assert appended.history_fingerprint(7) != changed.history_fingerprint(7)
    assert BlendedSamples.of({"a": other}, [first], seed=3).history_fingerprint(6) != alone.history_fingerprint(6)
