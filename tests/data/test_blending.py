from collections import Counter

import numpy as np
import pytest

from megachameleon.data.blending.blending import Blend, BlendedSamples, Draw, FirstSamples, what_changed
from megachameleon.data.blending.mixture import Stage
from megachameleon.data.packing.packed import open_packed

STRATA = {"text": [70], "pairs": [0, 5, 6, 20], "code": [13]}
SIZES = {name: sum(strata) for name, strata in STRATA.items()}
STAGES = [Stage(150, {"text": 0.6, "pairs": 0.3, "code": 0.1}), Stage(77, {"code": 1, "pairs": 2})]


def draws(blend: Blend, count: int) -> list:
    return [blend[position] for position in range(count)]


def test_random_access_equals_sequential_access_for_any_instance():
    expected = draws(Blend(STRATA, STAGES, seed=5, block_size=16), 227)
    other = Blend(dict(reversed(STRATA.items())), STAGES, seed=5, block_size=16)
    for position in np.random.default_rng(0).permutation(227).tolist():
        assert other[position] == expected[position]
    assert draws(Blend(STRATA, STAGES, seed=6, block_size=16), 227) != expected


def test_ranks_partition_the_same_order():
    expected = draws(Blend(STRATA, STAGES, seed=5, block_size=16), 224)
    for world in (2, 7):
        ranks = [Blend(STRATA, STAGES, seed=5, block_size=16) for _ in range(world)]
        assert [ranks[position % world][position] for position in range(224)] == expected


def test_every_epoch_visits_each_sample_once():
    blend = Blend(STRATA, [*STAGES, Stage(None, {"text": 1, "code": 3})], seed=1, block_size=16)
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
    blend = Blend(STRATA, [Stage(None, weights)], seed=1, block_size=50)
    counts: Counter = Counter()
    for position in range(1000):
        counts[blend[position].dataset] += 1
        slack = 0 if position % 50 == 49 else 2
        assert all(abs(counts[name] - weight * (position + 1)) <= slack + 1e-9 for name, weight in weights.items())


@pytest.mark.parametrize("first", [1, 16, 100, 149, 150])
def test_appended_stages_do_not_move_what_came_before(first):
    whole = Blend(STRATA, [Stage(None, STAGES[0].weights)], seed=5, block_size=16)
    cut = Blend(STRATA, [Stage(first, STAGES[0].weights), STAGES[1]], seed=5, block_size=16)
    assert draws(cut, first) == draws(whole, first)
    assert len(set(draws(cut, first + 77))) == first + 77  # nothing is repeated after the cut
    assert whole.history_fingerprint(first) == cut.history_fingerprint(first)
    assert whole.history_fingerprint(first + 1) != cut.history_fingerprint(first + 1)


@pytest.mark.parametrize("name", ["a", "middle", "zebra"])
def test_a_dataset_of_an_appended_stage_does_not_move_what_came_before(name):
    cut = [STAGES[0], Stage(70, STAGES[1].weights)]
    before = Blend(STRATA, cut, seed=5, block_size=16)
    appended = [*cut, Stage(50, {name: 1, "text": 2})]
    after = Blend({**STRATA, name: [9]}, appended, seed=5, block_size=16)
    assert draws(after, 220) == draws(before, 220)
    assert after.drawn_before(220) == {**before.drawn_before(220), name: 0}
    assert after.history_fingerprint(220) == before.history_fingerprint(220)
    larger = Blend({**STRATA, name: [10]}, appended, seed=5, block_size=16)
    assert after.history_fingerprint(221) != larger.history_fingerprint(221)


def test_drawn_before_counts_the_past():
    blend = Blend(STRATA, STAGES, seed=5, block_size=16)
    counts: Counter = Counter()
    for position in range(227):
        assert blend.drawn_before(position) == {name: counts[name] for name in SIZES}
        counts[blend[position].dataset] += 1
    assert blend.num_samples == 227
    with pytest.raises(IndexError):
        blend[227]


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
        Blend({**STRATA, "empty": [0]}, stages, seed=0)


def test_samples_can_be_traced_to_their_positions():
    blend = Blend(STRATA, [*STAGES, Stage(None, {"text": 1, "code": 3})], seed=1, block_size=16)
    read: dict = {}
    for position, draw in enumerate(draws(blend, 600)):
        assert blend.position_of(draw) == position
        read.setdefault((draw.dataset, draw.index), []).append(position)
    for name, size in SIZES.items():
        for index in range(size):
            assert list(blend.positions_of(name, index, 600)) == read.get((name, index), [])
    closed = Blend(STRATA, STAGES, seed=1, block_size=16)
    assert closed.position_of(Draw("text", 3, 5)) is None


@pytest.fixture
def packed(tmp_path, make_document, write_shard):
    """A function that writes documents of text and pictures as a shard and packs them."""

    def make(name, seed=0, *, text=6, length=15):
        write_shard(tmp_path / name, [make_document(text, 0, seed=seed + i) for i in range(12)])
        return open_packed([tmp_path / name], length, "best_fit")

    return make


def test_blended_samples_come_from_their_datasets(packed):
    datasets = {"a": packed("a"), "b": packed("b", 100)}
    blended = BlendedSamples.of(datasets, [Stage(None, {"a": 1, "b": 1})], seed=3)
    for position in range(30):
        draw = blended.blend[position]
        assert np.array_equal(blended[position].tokens, datasets[draw.dataset][draw.index].tokens)
    batch = blended.batch([3, 29, 4])
    assert batch.tokens.shape == (3, 15) and np.array_equal(batch.labels[1], blended[29].labels)
    longer = {**datasets, "b": packed("b", 100, length=16)}
    with pytest.raises(ValueError, match="sequence_length=15"):
        BlendedSamples.of(longer, [Stage(None, {"a": 1})], seed=3)


def test_the_first_samples_are_the_same_in_every_run(packed):
    dataset = packed("a")
    first = FirstSamples(dataset, 3)
    assert len(first) == 3 and np.array_equal(first.batch([2]).tokens[0], first[2].tokens)
    assert len(FirstSamples(dataset, 999)) == len(dataset)
    every = [FirstSamples(dataset)[i].tokens.tobytes() for i in range(len(dataset))]
    assert sorted(every) == sorted(dataset[i].tokens.tobytes() for i in range(len(dataset)))


def test_the_history_is_of_the_datasets_that_were_drawn_from(packed):
    a, b, other = packed("a"), packed("b", 50), packed("c", 100)
    first, second = Stage(6, {"a": 1}), Stage(None, {"a": 1, "b": 1})
    alone = BlendedSamples.of({"a": a}, [first], seed=3)
    appended = BlendedSamples.of({"a": a, "b": b}, [first, second], seed=3)
    changed = BlendedSamples.of({"a": a, "b": other}, [first, second], seed=3)
    assert alone.history(6) == appended.history(6) == changed.history(6)
    assert "dataset b has other shards or packing" in what_changed(appended.history(7), changed.history(7))
    another = BlendedSamples.of({"a": other}, [first], seed=3)
    assert what_changed(alone.history(6), another.history(6)) == (
        "dataset a has other shards or packing (1 shards, 12 documents; it had 1 shards, 12 documents)"
    )
    assert "seed" in what_changed(alone.history(6), BlendedSamples.of({"a": a}, [first], seed=4).history(6))
    assert "earlier version" in what_changed("0123abcd", alone.history(6))


@pytest.mark.parametrize("window", [64, 256])
def test_every_window_has_the_picture_tokens_that_were_asked_for(tmp_path, make_document, write_shard, window):
    """Four kinds of documents, few and many pictures: 45 % within 1 % (2 % for 64 samples) in every window."""
    random = np.random.default_rng(0)
    datasets = {}
    for name, pictures in {"text": (0, 1), "pairs": (1, 2), "mixed": (0, 6), "albums": (5, 9)}.items():
        documents = []
        for i in range(600):
            count = random.integers(*pictures)
            documents.append(make_document(*random.permutation([0] * count + [int(random.integers(1, 30))]), seed=i))
        write_shard(tmp_path / name, documents)
        datasets[name] = open_packed([tmp_path / name], 127, "best_fit")
    weights = {"text": 0.3, "pairs": 0.3, "mixed": 0.2, "albums": 0.2}
    blend = BlendedSamples.of(datasets, [Stage(None, weights, "tokens", 0.45)], seed=3)
    batches = [blend.batch(range(start, start + window)) for start in range(0, 24 * window, window)]
    shares = [(batch.image_mask * batch.loss_mask).sum() / batch.loss_mask.sum() for batch in batches]
    assert np.abs(np.array(shares) - 0.45).max() < (0.01 if window == 256 else 0.02)
    assert abs(np.mean(shares) - 0.45) < 0.002
