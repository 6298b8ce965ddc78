import io
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from adversarial_texts import TEXTS, mixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from release_files import write_release
from tokenizers import Tokenizer

from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.byte_level_training import train_byte_level
from megachameleon.tokens.text.huggingface import export_text_tokenizer
from megachameleon.tokens.text.importing import import_text_tokenizer
from megachameleon.tokens.text.sentencepiece_engine import SentencePieceEngine
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=900, num_image_codes=16, image_grid=(4, 4))
SPECIAL = {"<s>": "bos", "</s>": "eos", "<image>": "unk", "<racm3:break>": "begin_image", "<eoss>": "end_image"}
"""Ids by what they are called in an export of a vocabulary without reserved ids."""


class Exported:
    """A tokenizer of ours, and both libraries over its export."""

    def __init__(self, tokenizer, folder):
        from transformers import AutoTokenizer

        export_text_tokenizer(tokenizer, folder)
        self.ours = tokenizer
        self.library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.auto = AutoTokenizer.from_pretrained(folder)

    def require_same(self, text):
        ids = self.ours.encode(text)
        assert self.library.encode(text, add_special_tokens=False).ids == ids
        assert self.library.decode(ids) == self.ours.decode(ids) == text
        assert self.auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        with_bos = self.auto(text, split_special_tokens=True)["input_ids"]
        assert with_bos == [self.ours.vocabulary.bos, *ids]
        assert self.auto.decode(with_bos, skip_special_tokens=True) == text


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def exported(request, tmp_path_factory):
    texts = [path.read_text() for path in sorted(Path(re.__file__).parent.glob("*.py"))]
    train = {"sentencepiece": train_text_tokenizer, "byte-level": train_byte_level}[request.param]
    tokenizer = train([*texts, "Grüße aus Köln, 你好, ça va ▁ e\u0301"], VOCABULARY, tmp_path_factory.mktemp("ours"))
    return Exported(tokenizer, tmp_path_factory.mktemp("exported"))


def test_adversarial_texts_have_the_same_ids(exported):
    pieces = [piece.decode(errors="replace") for piece in exported.ours.engine.pieces]
    for text in [*TEXTS, *mixtures(1500, pieces), Path(re.__file__).read_text()]:
        exported.require_same(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("ab 1▁\n\t<>é\u0301漢🙂\u200d\r\0"))
def test_any_text_has_the_same_ids(exported, text):
    exported.require_same(text)


def test_special_tokens_are_found_in_text_unless_they_are_to_be_split(exported):
    """By transformers; the library finds none. Picture codes and reserved ids are found by neither."""
    vocabulary, split = exported.ours.vocabulary, {"split_special_tokens": True, "add_special_tokens": False}
    text = "x" + "".join(SPECIAL)
    found = exported.auto(text, add_special_tokens=False)["input_ids"]
    assert found[1:] == [getattr(vocabulary, field) for field in SPECIAL.values()]
    assert exported.auto.decode(found, skip_special_tokens=True) == "x"
    assert min(exported.auto(text, **split)["input_ids"]) >= vocabulary.text_start
    assert min(exported.library.encode(text, add_special_tokens=False).ids) >= vocabulary.text_start
    assert min(exported.auto("IMGIMGAZ<unk>")["input_ids"][1:]) >= vocabulary.text_start
    assert exported.auto.convert_tokens_to_ids(["IMGIMGAZ", "<s>"]) == [vocabulary.image_code_start, vocabulary.bos]
    assert len(exported.auto) == exported.library.get_vocab_size() == vocabulary.size
    names = [exported.auto.bos_token_id, exported.auto.eos_token_id, exported.auto.pad_token_id]
    assert names == [vocabulary.bos, vocabulary.eos, vocabulary.pad]
    assert exported.auto(exported.auto.sep_token)["input_ids"][1:] == [vocabulary.turn_separator]
    assert (exported.auto.image_token, exported.auto.boi_token, exported.auto.eoi_token) == tuple(SPECIAL)[2:]
    assert exported.auto.unk_token is None


def test_an_imported_release_of_full_size_comes_out_again(tmp_path):
    source = write_release(tmp_path / "text_tokenizer.json")
    tokenizer = import_text_tokenizer(source, tmp_path / "ours")
    exported = Exported(tokenizer, tmp_path / "exported")
    names = exported.auto.convert_ids_to_tokens([3, 8198, 8710, 8711, 8712])
    assert names == ["<unk>", "<sentinel:0>", "<reserved08706>", "<image>", "<reserved08708>"]
    assert exported.auto("<image><sentinel:0>")["input_ids"][:2] == [0, 8711]
    assert min(exported.auto("<sentinel:0>")["input_ids"][1:]) >= 16384
    for text in [*TEXTS, *mixtures(100, ["the", "self"])]:
        exported.require_same(text)
    again = import_text_tokenizer(tmp_path / "exported", tmp_path / "again")
    assert again.encode("the self (1 2)  x") == tokenizer.encode("the self (1 2)  x")


def few_letters(sentences, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    source = model.getvalue()
    num_text_ids = sentencepiece.SentencePieceProcessor(model_proto=source).get_piece_size() - 1
    layout = {"begin_image": 21, "end_image": 20, "turn_separator": 22, "num_image_codes": 16, "image_grid": (4, 4)}
    vocabulary = Vocabulary(size=23 + num_text_ids, text_start=23, **layout)
    return TextTokenizer(SentencePieceEngine(source, vocabulary, "test"), vocabulary)


def test_pieces_that_overlap_themselves_are_merged_in_the_same_order(tmp_path):
    draw = random.Random(0)

    def letters(longest):
        return "".join(draw.choices("ab ", weights=[3, 3, 1], k=draw.randrange(1, longest)))

    settings = {"vocab_size": 400, "split_by_whitespace": False, "allow_whitespace_only_pieces": True}
    tokenizer = few_letters([letters(60) for _ in range(300)], **settings)
    export_text_tokenizer(tokenizer, tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [letters(100) for _ in range(3000)]:
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_a_learnt_piece_that_looks_special_keeps_its_id(tmp_path):
    settings = {"vocab_size": 290, "hard_vocab_limit": False, "split_by_unicode_script": False}
    tokenizer = few_letters(["a<s>b <s> c</s>"] * 30, **settings)
    assert b"<s>" in tokenizer.engine.pieces
    exported = Exported(tokenizer, tmp_path)
    exported.require_same("<s> a<s>b")
    assert exported.auto.bos_token == "<<s>>"
    assert exported.auto.bos_token_id == tokenizer.vocabulary.bos


def test_what_cannot_be_exported_is_refused(exported, tmp_path):
    exported.ours.vocabulary.save(tmp_path)
    with pytest.raises(ValueError, match="export into another folder"):
        export_text_tokenizer(exported.ours, tmp_path)
    foreign = few_letters(["a b c"] * 30, vocab_size=290, hard_vocab_limit=False, user_defined_symbols=["abc"])
    with pytest.raises(ValueError, match=r"\['abc'\] that stand alone cannot be exported"):
        export_text_tokenizer(foreign, tmp_path / "out")
