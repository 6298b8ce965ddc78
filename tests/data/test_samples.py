import numpy as np

from megachameleon.data.samples import Sample, stack, to_tensors


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


def test_a_document_of_one_id_teaches_nothing(vocabulary):
    sample = Sample.from_pieces([np.array([9]), np.array([9, 8]), np.array([9])], 4, vocabulary)
    assert sample.loss_mask.tolist() == [0, 1, 0, 0]
    assert sample.document_ids.tolist() == [0, 1, 1, 2] and sample.position_ids.tolist() == [0, 0, 1, 0]


def test_batches_stack_samples(vocabulary):
    samples = [Sample.from_pieces([np.arange(n) + vocabulary.text_start], 6, vocabulary) for n in (3, 7)]
    batch = Sample.empty(2, 6)
    for row, sample in enumerate(samples):
        batch.row(row).lay(
            np.append(sample.tokens, sample.labels[-1])[: [3, 7][row]], np.array([[3, 7][row]]), vocabulary
        )
    for name, tensor in to_tensors(stack(samples)).items():
        assert tensor.shape == (2, 6) and np.array_equal(tensor.numpy(), getattr(batch, name))
