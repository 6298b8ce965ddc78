import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adversarial_texts import TEXTS, mixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from release_files import release_file, write_release
from tokenizers import Tokenizer

from megachameleon.tokens.text import TextTokenizer, word_memory
from megachameleon.tokens.text.byte_level_training import train_byte_level
from megachameleon.tokens.text.importing import import_text_tokenizer
from megachameleon.tokens.text.piece_names import code_name
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]
SMALL = Vocabulary.compact(num_text_ids=400, num_image_codes=16, image_grid=(4, 4))
SMALL_LAYOUT = {"codes": 16, "text_start": SMALL.text_start, "size": SMALL.size}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release") / "text_tokenizer.json")


@pytest.fixture(scope="module")
def library(source):
    """The library itself, told that text spelling special pieces is text."""
    library = Tokenizer.from_file(str(source))
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    return import_text_tokenizer(source, tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def stdlib():
    return [path.read_text() for path in sorted(Path(re.__file__).parent.glob("*.py"))]


def require_same(tokenizer, library, text):
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(i >= 16_384 for i in ids)


def test_a_release_of_full_size_gives_the_ids_of_the_library(tokenizer, library, stdlib):
    assert tokenizer.vocabulary == Vocabulary()
    for text in [*TEXTS, *mixtures(500, ["reserved", " the", "self"]), *stdlib]:
        require_same(tokenizer, library, text)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_gives_the_ids_of_the_library(tokenizer, library, text):
    require_same(tokenizer, library, text)


def test_what_the_library_takes_for_special_stays_text(source, tokenizer):
    plain = Tokenizer.from_file(str(source))
    for name, i in (("<s>", 0), ("<racm3:break>", 8197), (code_name(1002), 1006), ("<reserved08706>", 8710)):
        assert plain.encode(f"x{name}").ids[1:] == [i]
        assert min(tokenizer.encode(f"x{name}")) >= 16_384


def test_text_is_cut_as_in_the_release(tokenizer):
    def spelled(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert spelled("2010") == ["2", "0", "1", "0"]
    assert spelled("\n\n\t\t") == ["\n", "\n", "\t", "\t"]
    assert spelled("(the <s") == ["(", "t", "he", " ", "<", "s"]
    assert spelled("       the") == ["    ", "  ", " the"]


def test_remembered_words_are_forgotten_when_there_are_too_many(source, library, tmp_path, monkeypatch):
    monkeypatch.setattr(word_memory, "MAX_WORDS", 5)
    tokenizer = import_text_tokenizer(source, tmp_path)
    for _ in range(2):
        require_same(tokenizer, library, "one two three four five six (seven)\n eight nine\n")
    assert 0 < len(tokenizer.engine._words) <= 5


def test_long_words_are_not_remembered(source, library, tmp_path):
    tokenizer = import_text_tokenizer(source, tmp_path)
    text = f"{'gattaca' * 100} {'cat' * 1000} cat"
    require_same(tokenizer, library, text)
    assert list(tokenizer.engine._words) == [" cat"]


def test_another_splitting_is_left_to_the_library(tmp_path):
    file = release_file()
    file["pre_tokenizer"]["pretokenizers"][3]["individual_digits"] = False
    (tmp_path / "text_tokenizer.json").write_text(json.dumps(file))
    tokenizer = import_text_tokenizer(tmp_path, tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("a 01")[-1:]) == "01"


def test_the_folder_keeps_the_file_and_says_where_it_is_from(source, tokenizer, tmp_path):
    import_text_tokenizer(source.parent, tmp_path)  # the folder that holds it
    assert (tmp_path / "text.json").read_bytes() == source.read_bytes()
    again = TextTokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_array("the self").dtype == "uint16"
    assert again.encode("the self") == tokenizer.encode("the self")
    provenance = json.loads((tmp_path / "tokenizer.json").read_text())
    assert provenance["imported_from"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["fingerprint"] == again.fingerprint


def swap(file, first, second):
    vocab = file["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in (first, second)]


DAMAGE = {
    "model.type is 'WordPiece'": lambda file: file["model"].update(type="WordPiece"),
    "model.dropout is 0.1": lambda file: file["model"].update(dropout=0.1),
    "model.ignore_merges is True": lambda file: file["model"].update(ignore_merges=True),
    "normalizer is": lambda file: file.update(normalizer={"type": "NFC"}),
    "add_prefix_space": lambda file: file["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    "'Removed'": lambda file: file["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "'Whitespace'": lambda file: file["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}),
    "only ByteLevel step": lambda file: file["pre_tokenizer"]["pretokenizers"].pop(),
    "end_image: the piece '<eoss>' has id 21": lambda file: swap(file, "<eoss>", "<racm3:break>"),
    "code 3: the piece 'IMGIMGDZ' has id 8": lambda file: swap(file, "IMGIMGDZ", "IMGIMGEZ"),
    "the piece 'a' of byte 97 is missing": lambda file: file["model"]["vocab"].pop("a"),
    "'<s>' has id 5 in added_tokens, but 0": lambda file: file["added_tokens"][0].update(id=5),
    "with the text id": lambda file: file["added_tokens"].append({"id": SMALL.text_start + 3, "content": "$"}),
    "share id 30": lambda file: file["model"]["vocab"].update({"b": 30, "c": 30}),
    "no model.vocab": lambda file: file["model"].update(vocab=["a"]),
    "without content or id": lambda file: file["added_tokens"].append({"content": "x"}),
    "text pieces with ids": lambda file: file["model"]["vocab"].update(more=5000),
    "pre_tokenizer does not end": lambda file: file["pre_tokenizer"].update(pretokenizers=None),
    "stands for no byte": lambda file: file["model"]["vocab"].update({"漢": file["model"]["vocab"].pop("01")}),
    "the tokenizers library refuses it": lambda file: file["model"]["merges"].append("漢 字"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_unexpected_files_are_refused(message, tmp_path):
    file = release_file(**SMALL_LAYOUT)
    DAMAGE[message](file)
    (tmp_path / "text_tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        import_text_tokenizer(tmp_path / "text_tokenizer.json", tmp_path / "out", SMALL)
    assert str(tmp_path / "text_tokenizer.json") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_of_another_form_are_refused(tmp_path):
    path = tmp_path / "text_tokenizer.json"
    for content, message in ((b"\xff", "not valid JSON"), (b"[" * 100_000, "nested"), (b"[]", "no model.vocab")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            import_text_tokenizer(path, tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="holds none of"):
        import_text_tokenizer(REPOSITORY / "tests", tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file"):
        import_text_tokenizer(tmp_path / "nowhere.json", tmp_path / "out")


def test_a_small_layout_is_not_taken_for_the_release(tmp_path):
    path = write_release(tmp_path / "text_tokenizer.json", **SMALL_LAYOUT)
    with pytest.raises(ValueError, match="not of this vocabulary's layout"):
        import_text_tokenizer(path, tmp_path / "out")
    assert import_text_tokenizer(path, tmp_path / "out", SMALL).vocabulary == SMALL


def test_one_folder_holds_one_kind(stdlib, tmp_path):
    write_release(tmp_path / "text_tokenizer.json", **SMALL_LAYOUT)
    import_text_tokenizer(tmp_path, tmp_path / "out", SMALL)
    train_text_tokenizer(stdlib, SMALL, tmp_path / "out")
    assert not (tmp_path / "out/text.json").exists()
    (tmp_path / "out/text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds text\.model and text\.json"):
        TextTokenizer.load(tmp_path / "out")


def test_training_cuts_and_lays_out_like_the_release(stdlib, tmp_path):
    tokenizer = train_byte_level(stdlib, SMALL, tmp_path)
    names = json.loads((tmp_path / "text.json").read_text())["model"]["vocab"]
    expected = release_file(**SMALL_LAYOUT)
    assert [n for n in names if names[n] < SMALL.text_start + 256] == list(expected["model"]["vocab"])[
        : SMALL.text_start + 256
    ]
    library = Tokenizer.from_str(json.dumps(expected))
    for text in [*TEXTS, *mixtures(300, ["import", " self", "12"])]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=SMALL.text_start) >= SMALL.text_start
        cuts = {end for _, (_, end) in library.pre_tokenizer.pre_tokenize_str(text)}
        ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        assert cuts <= set(ends) or "\ufffd" in text or not text.isascii()


def test_training_byte_level_again_gives_the_same_bytes(stdlib, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(stdlib))
    command = [sys.executable, REPOSITORY / "tools/train_text_tokenizer.py", "--input", tmp_path / "text.txt"]
    command += ["--kind", "byte-level", "--vocab-size", "640", "--num-codes", "16", "--grid", "4x4"]
    for name in "ab":
        subprocess.run([*command, "--output", tmp_path / name], check=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert (tmp_path / "a/text.json").read_bytes() == (tmp_path / "b/text.json").read_bytes()
    assert TextTokenizer.load(tmp_path / "a").vocabulary.size == 640


def test_no_piece_is_named_like_a_picture_code(stdlib, tmp_path):
    names = " ".join(code_name(c) for c in range(16))
    tokenizer = train_byte_level([*stdlib, *[names] * 1000], SMALL, tmp_path)
    assert tokenizer.decode(tokenizer.encode(names)) == names


def test_too_little_text_for_bytes_names_a_size_that_works(stdlib, tmp_path):
    large = Vocabulary.compact(num_text_ids=9000, num_image_codes=16, image_grid=(4, 4))
    with pytest.raises(ValueError, match="too little for") as error:
        train_byte_level([stdlib[0][:3000]], large, tmp_path)
    size = int(re.search(r"vocabulary of ([\d,]+) ids", str(error.value))[1].replace(",", ""))
    fits = Vocabulary.compact(num_text_ids=size - SMALL.text_start, num_image_codes=16, image_grid=(4, 4))
    assert train_byte_level([stdlib[0][:3000]], fits, tmp_path).encode("words")
    with pytest.raises(ValueError, match="no text"):
        train_byte_level(["", ""], SMALL, tmp_path)
    with pytest.raises(ValueError, match="bytes alone take 256"):
        train_byte_level(["x"], Vocabulary.compact(num_text_ids=9, num_image_codes=16, image_grid=(4, 4)), tmp_path)
