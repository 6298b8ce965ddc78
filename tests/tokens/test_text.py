import re
import runpy
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from adversarial_texts import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.training import sample_texts, train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]


def compact(num_text_ids: int) -> Vocabulary:
    return Vocabulary.compact(num_text_ids=num_text_ids, num_image_codes=16, image_grid=(2, 2))


@pytest.fixture(scope="module")
def texts():
    folder = Path(re.__file__).parent
    return [path.read_text() for path in sorted(folder.glob("*.py"))] * 2 + ["Grüße aus Köln, 你好 2024 0123456789"]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return train_text_tokenizer(texts, compact(800), tmp_path_factory.mktemp("tokenizer"))


def test_every_code_point_comes_back(tokenizer):
    for first in range(0, 0x110000, 0x400):
        text = "".join(chr(c) for c in range(first, first + 0x400) if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_adversarial_texts_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.vocabulary.text_start <= i < tokenizer.vocabulary.size for i in ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("ab 1▁\n\t<>éß漢🙂\u200d"))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stretches_of_a_long_text_give_what_the_whole_gives(texts, tokenizer):
    text = "".join(texts[:3]) + "▁" + texts[3].replace("\n", " ")
    whole = [piece for part in text.split("▁") for piece in [-1, *tokenizer.engine.processor.encode(part)]][1:]
    ids = tokenizer.encode(text)
    mark = whole.index(-1)
    start = tokenizer.vocabulary.text_start
    assert [i - start + 1 for i in ids[:mark] + ids[mark + 3 :]] == whole[:mark] + whole[mark + 1 :]
    assert tokenizer.decode(ids[mark : mark + 3]) == "▁"


def test_arrays_and_batches_hold_the_same_ids(tokenizer):
    text = "a ▁ b\n" * 200
    array = tokenizer.encode_array(text)
    assert array.dtype == tokenizer.vocabulary.token_dtype
    assert array.tolist() == tokenizer.encode(text) == tokenizer.encode_batch(["", text])[1].tolist()
    assert len(tokenizer.encode_array("")) == 0


def test_text_is_cut_as_in_the_release(tokenizer):
    def spelled(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert spelled("2024") == ["2", "0", "2", "4"]
    assert spelled("\n\n\t\t") == ["\n", "\n", "\t", "\t"]
    assert spelled(" (return)") == [" ", "(", "return", ")"]
    assert spelled("       the") == ["    ", "  ", " the"]


def test_no_piece_joins_punctuation_or_digits_with_anything(tokenizer):
    for piece in tokenizer.engine.pieces[256:]:
        text = piece.decode(errors="replace")
        assert len(text) == 1 or text.strip(" ").isalpha() or not text.strip(" "), text


def test_other_ids_are_left_out_and_torn_characters_marked(tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode("ok ▁")
    assert tokenizer.decode([vocabulary.bos, *vocabulary.encode_image([0, 1, 2, 3]), *ids, vocabulary.eos]) == "ok ▁"
    assert tokenizer.decode(ids[:-1]) == "ok \ufffd"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_training_again_gives_the_same_bytes(texts, tokenizer, tmp_path):
    again = train_text_tokenizer(texts, tokenizer.vocabulary, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint == TextTokenizer.load(tmp_path).fingerprint


def test_too_little_text_names_a_size_that_works(texts, tmp_path):
    with pytest.raises(ValueError, match="too little for") as error:
        train_text_tokenizer(texts[:1], compact(60_000), tmp_path)
    size = int(re.search(r"vocabulary of ([\d,]+) ids", str(error.value))[1].replace(",", ""))
    vocabulary = compact(size - 64 - 16)
    assert vocabulary.size <= size
    assert train_text_tokenizer(texts[:1], vocabulary, tmp_path).encode("x")


def test_too_few_ids_name_a_size_that_works(tmp_path):
    chinese = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))] * 20
    with pytest.raises(ValueError, match="do not hold its characters") as error:
        train_text_tokenizer(chinese, compact(280), tmp_path)
    size = int(re.search(r"vocabulary of ([\d,]+) ids", str(error.value))[1].replace(",", ""))
    with pytest.raises(ValueError, match="too little"):  # no longer the characters
        train_text_tokenizer(chinese, compact(size + 6400), tmp_path)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train_text_tokenizer(["", "\n"], compact(400), tmp_path)


def test_damaged_or_foreign_models_are_refused(texts, tokenizer, tmp_path):
    train_text_tokenizer(texts, tokenizer.vocabulary, tmp_path)
    compact(1200).save(tmp_path)
    with pytest.raises(ValueError, match="use the vocabulary that the tokenizer was trained with"):
        TextTokenizer.load(tmp_path)
    tokenizer.vocabulary.save(tmp_path)
    (tmp_path / "text.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "text.model").unlink()
    with pytest.raises(ValueError, match="no such file"):
        TextTokenizer.load(tmp_path)


def test_samples_do_not_depend_on_the_order_of_reading():
    texts = [f"text number {i}" for i in range(1000)]
    sample = sample_texts(texts, 4000)
    assert sample == sample_texts(reversed(texts), 4000)
    assert 3980 < sum(map(len, sample)) <= 4000
    assert sorted(sample_texts(texts, 1 << 20)) == sorted(texts)


def test_a_sample_of_few_long_texts_is_not_empty():
    texts = ["a" * 150, "b" * 151, "c" * 152, "d" * 153]
    for some in permutations(texts, 2):
        assert len(sample_texts(some, 200)) == 1
    assert len({tuple(sample_texts(some, 400)) for some in permutations(texts)}) == 1
    assert sample_texts(texts[:1], 100) == texts[:1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "chameleon", "--num-codes", "16"], "--num-codes and --grid are settings beside --vocab-size"),
        (["--layout", "chameleon", "--grid", "8x8"], "--num-codes and --grid are settings beside --vocab-size"),
        (["--vocab-size", "640", "--kind", "byte-level", "--character-coverage", "1"], "leave it out"),
    ],
)
def test_flags_that_would_not_count_are_refused(flags, message):
    tool = runpy.run_path(str(REPOSITORY / "tools/train_text_tokenizer.py"))
    with pytest.raises(ValueError, match=message):
        tool["main"](tool["parser"]().parse_args(["--input", "a", "--output", "b", *flags]))


def test_the_tool_trains_from_raw_sources(texts, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(texts))
    command = [sys.executable, REPOSITORY / "tools/train_text_tokenizer.py", "--input", tmp_path / "text.txt"]
    command += ["--output", tmp_path / "out", "--vocab-size", "640", "--num-codes", "16", "--grid", "2x2"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(REPOSITORY)})
    tokenizer = TextTokenizer.load(tmp_path / "out")
    assert tokenizer.vocabulary.size == 640 and tokenizer.vocabulary.image_grid == (2, 2)
