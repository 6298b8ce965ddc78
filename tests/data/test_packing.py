import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachameleon.data.packing.packing import PACKING_MODES, pack, safe_cuts
from megachameleon.data.packing.strata import NUM_STRATA, stratum_of
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=113, num_image_codes=8, image_grid=(2, 2))
PICTURE = VOCABULARY.image_length
SEGMENTS = st.lists(st.integers(0, 30), min_size=1, max_size=8)  # 0 is a picture, other numbers runs of text


def lay_out(documents):
    """Lengths [n], pictures by document [n], their spans [m, 2], and all ids as codes (-1 .. -4) or text (1)."""
    ids, lengths, counts, spans = [], [], [], []
    for segments in documents:
        document = [1]
        for segment in segments:
            if segment == 0:
                spans.append((len(document), PICTURE))
            document += [0, -1, -2, -3, -4, 0] if segment == 0 else [1] * segment
        ids += document
        lengths.append(len(document))
        counts.append(segments.count(0))
    return np.array(lengths), np.array(counts), np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(ids)


def pack_documents(documents, sequence_length, mode):
    lengths, counts, spans, ids = lay_out(documents)
    return pack(lengths, counts, spans, VOCABULARY, sequence_length, mode), lengths, ids


@settings(max_examples=150, deadline=None)
@given(st.lists(SEGMENTS, min_size=1, max_size=40), st.integers(5, 60), st.sampled_from(PACKING_MODES))
def test_every_id_stands_in_exactly_one_sample_and_labels_are_counted(documents, sequence_length, mode):
    packing, lengths, ids = pack_documents(documents, sequence_length, mode)
    pieces = [np.arange(a, a + n) for a, n in zip(packing.offsets, packing.lengths, strict=True)]
    assert np.array_equal(np.sort(np.concatenate(pieces)), np.arange(len(ids)))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(owner[piece])) == 1 for piece in pieces)  # no piece spans two documents
    for sample in range(len(packing)):
        mine = pieces[packing.ends[sample] : packing.ends[sample + 1]]
        assert 0 < sum(map(len, mine)) <= sequence_length + 1
        labels = np.concatenate([ids[piece][1:] for piece in mine])
        assert packing.labels[sample] == len(labels)
        assert packing.image_labels[sample] == (labels < 0).sum()
    strata = stratum_of(packing.labels, packing.image_labels)
    assert (np.diff(strata) >= 0).all() and packing.strata.sum() == len(packing) and len(packing.strata) == NUM_STRATA


@settings(max_examples=150, deadline=None)
@given(st.lists(SEGMENTS, min_size=1, max_size=40), st.integers(5, 60), st.sampled_from(PACKING_MODES[:2]))
def test_pictures_are_never_cut(documents, sequence_length, mode):
    packing, _, ids = pack_documents(documents, sequence_length, mode)
    inside = np.flatnonzero(ids == -1)  # the first code; its picture begins one id before
    for offset, length in zip(packing.offsets, packing.lengths, strict=True):
        for cut in (offset, offset + length):
            assert not ((inside - 1 < cut) & (cut < inside - 1 + PICTURE)).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(SEGMENTS, min_size=1, max_size=40), st.integers(20, 60))
def test_best_fit_keeps_documents_whole_that_fit(documents, sequence_length):
    packing, lengths, _ = pack_documents(documents, sequence_length, "best_fit")
    fitting = lengths[lengths <= sequence_length + 1]
    assert len(packing.lengths) - len(fitting) >= (lengths > sequence_length + 1).sum() * 2
    starts = np.cumsum(lengths) - lengths
    pieces = set(zip(packing.offsets.tolist(), packing.lengths.tolist(), strict=True))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        assert length > sequence_length + 1 or (start, length) in pieces


@pytest.mark.parametrize(("mode", "fill"), [("best_fit", 0.97), ("whole_pictures", 0.94), ("continuous", 0.99)])
def test_samples_are_full(mode, fill):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 12, 3).tolist() for _ in range(800)]
    packing, lengths, _ = pack_documents(documents, 60, mode)
    assert lengths.sum() / (len(packing) * 61) > fill


def test_continuous_samples_are_all_full_but_the_last():
    packing, lengths, _ = pack_documents([[5, 0, 7]] * 50, 20, "continuous")
    sizes = np.add.reduceat(packing.lengths, packing.ends[:-1])
    assert sorted(sizes.tolist())[1:] == [21] * (int(lengths.sum()) // 21)


def test_documents_do_not_stay_beside_their_neighbours():
    packing, _, _ = pack_documents([[5]] * 400, 11, "continuous")
    starts = packing.offsets[packing.lengths == 6] // 6
    assert np.mean(np.abs(np.diff(starts)) == 1) < 0.1


def test_safe_cuts_fill_pieces_and_respect_picture_edges():
    assert safe_cuts(25, np.array([]), 6, 10).tolist() == [0, 10, 20, 25]
    assert safe_cuts(10, np.array([]), 6, 10).tolist() == [0, 10]
    assert safe_cuts(25, np.array([4, 10]), 6, 10).tolist() == [0, 10, 20, 25]
    assert safe_cuts(25, np.array([5, 11]), 6, 10).tolist() == [0, 5, 11, 21, 25]
    assert safe_cuts(25, np.array([5, 11]), 0, 10).tolist() == [0, 10, 20, 25]


@pytest.mark.parametrize("mode", PACKING_MODES)
def test_a_picture_longer_than_a_sample_is_refused_unless_it_may_be_cut(mode):
    if mode == "continuous":
        assert len(pack_documents([[1, 0]], 4, mode)[0]) == 2
        return
    with pytest.raises(ValueError, match="set sequence_length to 5 or more"):
        pack_documents([[1, 0]], 4, mode)
    assert len(pack_documents([[1, 0]], 5, mode)[0]) == 2


@pytest.mark.parametrize("mode", PACKING_MODES)
def test_an_empty_shard_has_no_samples(mode):
    assert len(pack_documents([], 10, mode)[0]) == 0
