import pytest
import torch

from megachameleon.generation.modality import UNDECIDED, ModalityMachine, open_picture_start, text_mask


def machine(vocabulary, prompts, **changes):
    options = {"modality": "both", "limits": [30] * len(prompts), "max_pictures": None, **changes}
    return ModalityMachine(vocabulary, prompts, **options)


def feed(state, *ids):
    for one in ids:
        state.advance(torch.tensor([one]))


def test_text_mask_holds_text_and_the_end_only(vocabulary):
    allowed = text_mask(vocabulary).nonzero().flatten().tolist()
    assert allowed == [vocabulary.eos, *range(vocabulary.text_start, vocabulary.size)]


def test_a_picture_has_exactly_its_codes_then_its_end_is_forced(vocabulary):
    state = machine(vocabulary, [[vocabulary.bos]])
    feed(state, vocabulary.begin_image)
    for _ in range(vocabulary.codes_per_image):
        assert state.in_picture.all()
        assert state.forced().item() == UNDECIDED
        feed(state, vocabulary.image_code_start)
    assert state.forced().item() == vocabulary.end_image
    feed(state, vocabulary.end_image)
    assert not state.in_picture.any()
    assert state.forced().item() == UNDECIDED
    assert state.pictures.item() == 1


def test_a_picture_begins_only_where_it_fits(vocabulary):
    limit = 1 + vocabulary.image_length
    assert machine(vocabulary, [[0]], limits=[limit]).may_begin.all()
    assert not machine(vocabulary, [[0]], limits=[limit - 1]).may_begin.any()
    assert not machine(vocabulary, [[0]], modality="text").may_begin.any()


def test_no_more_pictures_than_asked(vocabulary):
    state = machine(vocabulary, [[0]], max_pictures=1)
    feed(state, *vocabulary.encode_image([0] * vocabulary.codes_per_image).tolist())
    assert not state.may_begin.any()


def test_image_modality_forces_pictures_and_ends(vocabulary):
    state = machine(vocabulary, [[0, 20]], modality="image", max_pictures=1)
    assert state.forced().item() == vocabulary.begin_image
    feed(state, *vocabulary.encode_image([1] * vocabulary.codes_per_image).tolist())
    assert state.finished.all()


def test_rows_end_by_themselves(vocabulary):
    state = machine(vocabulary, [[0], [0], [0]], limits=[30, 2, 30])
    state.advance(torch.tensor([vocabulary.eos, 20, 20]))
    assert state.finished.tolist() == [True, True, False]
    state.advance(torch.tensor([20, 20, 20]))
    assert state.lengths.tolist() == [2, 2, 3]


def test_open_picture_in_the_prompt_is_continued(vocabulary):
    state = machine(vocabulary, [[0, vocabulary.begin_image, 4, 5]])
    assert state.codes.item() == 2
    assert open_picture_start([0, vocabulary.begin_image, 4], vocabulary) == 1
    assert open_picture_start([0, vocabulary.begin_image, 4, vocabulary.end_image], vocabulary) is None


def test_prompts_that_cannot_be(vocabulary):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        machine(vocabulary, [[0], []])
    with pytest.raises(ValueError, match="not all of them codes"):
        machine(vocabulary, [[vocabulary.begin_image, vocabulary.text_start]])
    with pytest.raises(ValueError, match="more than 6"):
        machine(vocabulary, [[vocabulary.begin_image] + [4] * 7])
    with pytest.raises(ValueError, match="ends inside a picture"):
        machine(vocabulary, [[vocabulary.begin_image]], modality="text")
