import json
from dataclasses import asdict

import numpy as np
import pytest

from megachameleon.tokens.vocabulary import Vocabulary


def test_the_default_is_chameleons_layout():
    vocabulary = Vocabulary()
    controls = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "end_image": 8196, "begin_image": 8197, "turn_separator": 8710}
    assert vocabulary.control_ids == controls
    assert (vocabulary.size, vocabulary.image_code_start, vocabulary.image_code_end) == (65_536, 4, 8196)
    assert (vocabulary.num_text_ids, vocabulary.codes_per_image, vocabulary.image_length) == (49_152, 1024, 1026)
    assert vocabulary.token_dtype is np.uint16


def test_compact_layouts_keep_the_order_and_divide_by_64():
    vocabulary = Vocabulary.compact(num_text_ids=300, num_image_codes=16, image_grid=(2, 3))
    assert vocabulary.size % 64 == 0
    assert vocabulary.num_text_ids >= 300
    assert vocabulary.image_code_end == vocabulary.end_image == vocabulary.begin_image - 1
    assert vocabulary.text_start == vocabulary.turn_separator + 1


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_ids_take_two_bytes_as_long_as_they_fit(size, dtype):
    assert Vocabulary(size=size).token_dtype is dtype


def test_pictures_are_begin_codes_end():
    vocabulary = Vocabulary.compact(num_text_ids=9, num_image_codes=16, image_grid=(2, 2))
    ids = vocabulary.encode_image(np.array([[0, 1], [14, 15]], dtype=np.uint16))
    assert ids.tolist() == [vocabulary.begin_image, 4, 5, 18, 19, vocabulary.end_image]
    assert vocabulary.is_image_code(ids).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("codes", "message"), [([0, 1, 2], "3 codes"), ([0, 1, 2, 16], "outside"), ([0, 1, 2, -1], "outside")]
)
def test_wrong_codes_are_refused(codes, message):
    vocabulary = Vocabulary.compact(num_text_ids=9, num_image_codes=16, image_grid=(2, 2))
    with pytest.raises(ValueError, match=message):
        vocabulary.encode_image(np.array(codes))


@pytest.mark.parametrize(
    "changes",
    [
        {"bos": 1},
        {"end_image": 100},
        {"turn_separator": 20_000},
        {"num_image_codes": 0},
        {"image_grid": (0, 32)},
        {"num_image_codes": 17_000},
        {"size": 16_384},
        {"size": 2**31 + 1},
        {"image_code_start": -3},
        {"pad": -1},
    ],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(**changes)


def test_saved_and_loaded_layouts_are_equal(tmp_path):
    vocabulary = Vocabulary.compact(num_text_ids=300, num_image_codes=16, image_grid=(2, 3))
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert loaded == vocabulary and loaded.fingerprint == vocabulary.fingerprint
    assert loaded.fingerprint != Vocabulary().fingerprint


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(ValueError, match="no such file"):
        Vocabulary.load(tmp_path)
    for text in ("{", "[]", json.dumps({"size": 5})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"vocabulary\.json"):
            Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "65536"),
        ("size", 65_536.0),
        ("bos", True),
        ("pad", None),
        ("eos", [2]),
        ("image_grid", 32),
        ("image_grid", [32]),
        ("image_grid", [32, 32, 32]),
        ("image_grid", [32, "32"]),
        ("image_grid", "ab"),
    ],
)
def test_values_of_another_type_are_refused_with_file_and_field(tmp_path, field, value):
    values = {**asdict(Vocabulary()), field: value}
    (tmp_path / "vocabulary.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"vocabulary\.json: {field}="):
        Vocabulary.load(tmp_path)


def test_contradictions_in_a_file_name_it(tmp_path):
    (tmp_path / "vocabulary.json").write_text(json.dumps({**asdict(Vocabulary()), "bos": 1}))
    with pytest.raises(ValueError, match=r"vocabulary\.json: vocabulary: two control ids"):
        Vocabulary.load(tmp_path)


def test_a_mismatch_names_the_field():
    with pytest.raises(ValueError, match="shard has size=65536 but that of run has 65600"):
        Vocabulary().require_same(Vocabulary(size=65_600), "shard", "run")
