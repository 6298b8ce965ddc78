import pytest
import torch

from megachameleon.generation.engine import generate
from megachameleon.generation.sampling import SamplingSettings
from megachameleon.generation.settings import GenerationSettings

GREEDY = SamplingSettings(greedy=True)
HOT = SamplingSettings(temperature=2.0, top_p=1.0)
PLAIN = {"guidance": 1.0, "image_guidance": 1.0}


def pictures_of(ids, vocabulary):
    """Check the grammar of generated ids and return the codes of each picture."""
    pictures, index = [], 0
    while index < len(ids):
        if ids[index] == vocabulary.begin_image:
            codes = ids[index + 1 : index + 1 + vocabulary.codes_per_image]
            assert len(codes) == vocabulary.codes_per_image
            assert all(vocabulary.is_image_code(code) for code in codes)
            assert ids[index + 1 + vocabulary.codes_per_image] == vocabulary.end_image
            pictures.append(codes)
            index += vocabulary.image_length
        else:
            assert ids[index] >= vocabulary.text_start or (ids[index] == vocabulary.eos and index == len(ids) - 1)
            index += 1
    return pictures


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_mixed_rows_obey_the_grammar_and_draw_pictures(stepper, vocabulary, guidance):
    settings = GenerationSettings(text=HOT, image=HOT, guidance=guidance, batch_size=4)
    prompts = [[vocabulary.bos, vocabulary.text_start + i] for i in range(12)]
    results = generate(stepper, vocabulary, prompts, settings)
    assert sum(len(pictures_of(ids, vocabulary)) for ids in results) > 3
    assert all(len(ids) + 2 == stepper.context_length or ids[-1] == vocabulary.eos for ids in results)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_row_does_not_depend_on_its_batch(stepper, vocabulary, guidance):
    settings = GenerationSettings(text=HOT, image=HOT, guidance=guidance, batch_size=5, max_new_tokens=40)
    prompts = [[vocabulary.bos] + [vocabulary.text_start + i] * (i + 1) for i in range(5)]
    together = generate(stepper, vocabulary, prompts, settings)
    alone = [generate(stepper, vocabulary, [ids], settings, rows=[row])[0] for row, ids in enumerate(prompts)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 5


def test_the_seed_decides(stepper, vocabulary):
    prompts = [[vocabulary.bos, vocabulary.text_start]]
    runs = [
        generate(stepper, vocabulary, prompts, GenerationSettings(text=HOT, image=HOT, seed=seed)) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_image_modality_gives_one_picture_per_row(stepper, vocabulary):
    settings = GenerationSettings(modality="image", image=HOT, **PLAIN)
    prompts = [[vocabulary.bos, vocabulary.text_start], [vocabulary.bos, vocabulary.begin_image]]
    first, second = generate(stepper, vocabulary, prompts, settings)
    assert len(first) == vocabulary.image_length
    assert len(pictures_of(first, vocabulary)) == 1
    assert len(second) == vocabulary.image_length - 1
    assert second[-1] == vocabulary.end_image


def test_text_modality_never_begins_a_picture(stepper, vocabulary):
    settings = GenerationSettings(modality="text", text=HOT, max_new_tokens=50)
    for ids in generate(stepper, vocabulary, [[vocabulary.bos]] * 8, settings):
        assert pictures_of(ids, vocabulary) == []


def test_guided_logits_follow_the_three_way_formula(stepper, vocabulary):
    """The first greedy code of a picture after text and a picture, against the formula by hand."""
    settings = GenerationSettings(modality="image", image=GREEDY, guidance=3.0, image_guidance=1.2, max_new_tokens=1)
    text, begin = vocabulary.text_start + 3, vocabulary.begin_image
    picture = vocabulary.encode_image([1, 2, 3, 4, 5, 6]).tolist()
    prompt = [vocabulary.bos, text, *picture, text, begin]
    [[code]] = generate(stepper, vocabulary, [prompt], settings)
    full = stepper.logits_of(prompt)
    pictures = stepper.logits_of([vocabulary.bos, *picture, begin])
    bare = stepper.logits_of([vocabulary.bos, begin])
    guided = bare + 1.2 * (pictures - bare) + 3.0 * (full - pictures)
    codes = guided[vocabulary.image_code_start : vocabulary.image_code_end]
    assert code == vocabulary.image_code_start + int(codes.argmax())
    assert code != vocabulary.image_code_start + int(
        full[vocabulary.image_code_start : vocabulary.image_code_end].argmax()
    )


def test_guiding_streams_share_the_codes_drawn_so_far(stepper, vocabulary):
    settings = GenerationSettings(modality="image", image=HOT, guidance=2.0)
    generate(stepper, vocabulary, [[vocabulary.bos, vocabulary.text_start]], settings)
    assert stepper.prefilled == [
        [[vocabulary.bos, vocabulary.text_start, vocabulary.begin_image], [vocabulary.bos, vocabulary.begin_image]]
    ]
    assert stepper.contexts[0][3:] == stepper.contexts[1][2:]


def test_without_guidance_each_id_is_read_once(stepper, vocabulary):
    settings = GenerationSettings(modality="image", image=HOT, **PLAIN)
    generate(stepper, vocabulary, [[vocabulary.bos, vocabulary.text_start]] * 3, settings)
    assert len(stepper.prefilled) == 1
    assert stepper.decodes == vocabulary.codes_per_image - 1


def test_max_new_tokens_may_cut_a_picture_of_the_prompt(stepper, vocabulary):
    settings = GenerationSettings(modality="image", image=HOT, max_new_tokens=2, **PLAIN)
    [ids] = generate(stepper, vocabulary, [[vocabulary.bos, vocabulary.begin_image]], settings)
    assert len(ids) == 2
    assert all(vocabulary.is_image_code(code) for code in ids)


def test_repetition_penalty_reaches_the_text(stepper, vocabulary):
    strong = SamplingSettings(greedy=True, repetition_penalty=1e6)
    settings = GenerationSettings(modality="text", text=strong, max_new_tokens=10)
    [ids] = generate(stepper, vocabulary, [[vocabulary.bos]], settings)
    positive = [one for one in ids if one >= vocabulary.text_start]
    assert len(set(positive)) == len(positive)


def test_prompts_without_room(stepper, vocabulary):
    with pytest.raises(ValueError, match="prompt 0 has 64 ids and the model's context holds 64"):
        generate(stepper, vocabulary, [[vocabulary.bos] * 64], GenerationSettings())
    with pytest.raises(ValueError, match="a picture has 8"):
        generate(stepper, vocabulary, [[vocabulary.bos] * 60], GenerationSettings(modality="image"))


def test_progress_counts_every_row(stepper, vocabulary):
    counts: list[int] = []
    settings = GenerationSettings(text=HOT, image=HOT, batch_size=3, max_new_tokens=20)
    generate(stepper, vocabulary, [[vocabulary.bos]] * 7, settings, on_finished=counts.append)
    assert sum(counts) == 7


def test_logits_wider_than_the_vocabulary_are_cut(stepper, vocabulary):
    wide = stepper.logits
    stepper.logits = lambda: torch.nn.functional.pad(wide(), (0, 5), value=100.0)
    settings = GenerationSettings(text=HOT, image=HOT, max_new_tokens=20)
    for ids in generate(stepper, vocabulary, [[vocabulary.bos]] * 4, settings):
        assert max(ids) < vocabulary.size
