import numpy as np
import pytest

from megachameleon.data.packing import PackedDataset, safe_cuts
from megachameleon.data.samples import Sample, collate


def test_every_id_stands_in_exactly_one_sample(tmp_path, make_document, write_shard):
    random = np.random.default_rng(0)
    documents = [make_document(*random.integers(0, 12, 3), seed=i) for i in range(200)]
    packed = PackedDataset(write_shard(tmp_path / "x", documents), sequence_length=40, seed=1)
    seen = sorted(piece for i in range(len(packed)) for piece in packed.pieces(i))
    assert seen == [(i, 0, len(document)) for i, document in enumerate(documents)]  # none is longer than 41
    assert all(sum(n for _, _, n in packed.pieces(i)) <= 41 for i in range(len(packed)))
    assert packed.fill_rate > 0.9


def test_long_documents_are_cut_outside_pictures_only(tmp_path, make_document, write_shard, vocabulary):
    documents = [make_document(3, 0, 5, 0, 0, 30, 0, 2, seed=i) for i in range(20)]
    dataset = write_shard(tmp_path / "x", documents)
    packed = PackedDataset(dataset, sequence_length=12, seed=1)
    pieces = sorted(piece for i in range(len(packed)) for piece in packed.pieces(i))
    for number, document in enumerate(documents):
        mine = [(start, length) for d, start, length in pieces if d == number]
        assert np.array_equal(np.concatenate([document[a : a + n] for a, n in mine]), document)
        inside = {p for start, length in dataset.image_spans(number) for p in range(start + 1, start + length)}
        assert not inside & {start for start, _ in mine}


def test_safe_cuts_fill_pieces_and_respect_picture_edges():
    no_pictures = np.empty((0, 2), dtype=np.int64)
    assert safe_cuts(25, no_pictures, 10).tolist() == [0, 10, 20, 25]
    assert safe_cuts(10, no_pictures, 10).tolist() == [0, 10]
    assert safe_cuts(25, np.array([[4, 6], [10, 6]]), 10).tolist() == [0, 10, 20, 25]
    assert safe_cuts(25, np.array([[5, 6], [11, 6]]), 10).tolist() == [0, 5, 11, 21, 25]


def test_order_and_fingerprint_follow_data_length_and_seed(tmp_path, make_document, write_shard):
    dataset = write_shard(tmp_path / "x", [make_document(5, seed=i) for i in range(50)])

    def order(seed: int, length: int = 20) -> list:
        packed = PackedDataset(dataset, length, seed)
        return [packed.pieces(i) for i in range(len(packed))]

    assert order(1) == order(1) != order(2)
    prints = {PackedDataset(dataset, length, seed).fingerprint for length, seed in [(20, 1), (20, 2), (21, 1)]}
    assert len(prints) == 3


def test_a_picture_longer_than_the_context_is_refused(tmp_path, make_document, write_shard):
    dataset = write_shard(tmp_path / "x", [make_document(1, 0)])
    with pytest.raises(ValueError, match="set sequence_length to 5 or more"):
        PackedDataset(dataset, sequence_length=4, seed=0)
    assert len(PackedDataset(dataset, sequence_length=5, seed=0)) == 2


def test_sample_fields(vocabulary):
    bos, eos, pad, text = vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.text_start
    picture = vocabulary.encode_image(np.array([0, 1, 2, 3])).tolist()
    sample = Sample.from_pieces([np.array([bos, *picture, eos]), np.array([bos, text, eos])], 12, vocabulary)
    assert sample.tokens.tolist() == [bos, *picture, eos, bos, text, eos, pad]
    assert sample.labels.tolist() == [*picture, eos, pad, text, eos, pad, pad]
    assert sample.loss_mask.tolist() == [1] * 7 + [0, 1, 1, 0, 0]
    assert sample.document_ids.tolist() == [0] * 8 + [1] * 3 + [-1]
    assert sample.position_ids.tolist() == [*range(8), 0, 1, 2, 0]
    assert np.flatnonzero(sample.image_mask).tolist() == [1, 2, 3, 4]
    dtypes = [sample.tokens.dtype, sample.labels.dtype, sample.loss_mask.dtype, sample.document_ids.dtype]
    assert dtypes == [np.int64, np.int64, np.float32, np.int32]


def test_a_full_sample_predicts_its_last_id(vocabulary):
    ids = np.arange(5) + vocabulary.text_start
    sample = Sample.from_pieces([ids], 4, vocabulary)
    assert sample.labels.tolist() == ids[1:].tolist()
    assert sample.loss_mask.sum() == 4


def test_collate_stacks_fields(tmp_path, make_document, write_shard):
    packed = PackedDataset(write_shard(tmp_path / "x", [make_document(5, 0, seed=i) for i in range(9)]), 20, 0)
    batch = collate([packed[0], packed[1]])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 20)}
    assert batch["tokens"][1].tolist() == packed[1].tokens.tolist()
    with pytest.raises(IndexError):
        packed[len(packed)]
