"""Llama's tokenizer with ids for pictures: its pieces in its order, exact on every text, and refusals."""

import hashlib
import json

import pytest
import sentencepiece
from adversarial_texts import TEXTS
from llama_tokenizers import train_like_llama
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.huggingface import export_text_tokenizer
from megachameleon.tokens.text.importing import import_any_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

PICTURES = {"num_image_codes": 16, "image_grid": (2, 4)}
SOME = [
    "def match(self):\n    return 2024\n",
    " self",
    "self",
    "",
    "Grüße, 你好",
    "<s> a </s><unk><0x41>",
    "a  b   c\t\n\n d",
]


@pytest.fixture(scope="module")
def llama():
    return train_like_llama()


@pytest.fixture(scope="module")
def source(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(llama)
    return path


@pytest.fixture(scope="module")
def ours(source):
    import_any_text_tokenizer(source.parent, source.parent / "ours", **PICTURES)
    return TextTokenizer.load(source.parent / "ours")


def pieces_of(content):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    return model


def test_the_vocabulary_has_places_for_all(ours):
    vocabulary = ours.vocabulary
    assert vocabulary.size % 128 == 0 and vocabulary.num_text_ids == 500 - 3
    assert vocabulary.text_start - vocabulary.turn_separator > 64
    assert list(vocabulary.control_ids.values()) == [0, 1, 2, 3, 20, 21, 22]


def test_a_llama_2_is_laid_out_as_the_guide_says():
    vocabulary = Vocabulary.extended(num_text_ids=31_997, num_image_codes=8_192, image_grid=(32, 32))
    assert (vocabulary.size, vocabulary.text_start, vocabulary.turn_separator) == (40_320, 8_323, 8_198)


@pytest.mark.parametrize("num_text_ids", range(600, 728, 9))
def test_reserved_ids_never_run_out(num_text_ids):
    vocabulary = Vocabulary.extended(num_text_ids=num_text_ids, num_image_codes=16, image_grid=(2, 4))
    assert vocabulary.text_start - vocabulary.turn_separator - 1 >= 64 and vocabulary.size % 128 == 0
    assert vocabulary.num_text_ids == num_text_ids


def test_pieces_are_llamas_in_its_order(ours, llama):
    processor = sentencepiece.SentencePieceProcessor(model_proto=llama)
    theirs = [processor.id_to_piece(i) for i in range(3, 500)]
    assert [ours.engine.processor.id_to_piece(i) for i in range(1, 498)] == theirs


@pytest.mark.parametrize("text", SOME)
def test_text_is_split_as_llama_splits_it(ours, llama, text):
    """Where a space is written that Llama would have put there by itself."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=llama)
    shift = ours.vocabulary.text_start - 3
    assert [i - shift for i in ours.encode(" " + text if text else "")] == processor.encode(text)


def test_llama_itself_puts_a_space_first(ours, llama):
    """So the comparison above is one: without that space the ids are others."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=llama)
    assert [i - ours.vocabulary.text_start + 3 for i in ours.encode("self")] != processor.encode("self")


@pytest.mark.parametrize("text", [*TEXTS, *SOME])
def test_every_text_comes_back(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert all(ours.vocabulary.text_start <= i < ours.vocabulary.size for i in ids)


def test_the_record_names_the_file(ours, source, llama):
    record = json.loads((source.parent / "ours/tokenizer.json").read_text())
    assert record["imported_from"]["sha256"] == hashlib.sha256(llama).hexdigest()
    assert record["control_pieces"] == ["<s>", "</s>"] and record["never_in_text"] == []


def test_it_goes_on_to_hugging_face(ours, tmp_path):
    export_text_tokenizer(ours, tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in SOME:
        assert library.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_pieces_that_users_defined_are_not_found_in_text(tmp_path):
    """<|im_start|> in a text stays text, and what is around it keeps its ids."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_like_llama(user_defined=["<|im_start|>"]))
    tokenizer = import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)
    piece = tokenizer.engine.pieces.index(b"<|im_start|>") + tokenizer.vocabulary.text_start
    ids = tokenizer.encode("a <|im_start|> b")
    assert piece not in ids and tokenizer.decode(ids) == "a <|im_start|> b"
    export_text_tokenizer(tokenizer, tmp_path / "hf")
    assert Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json")).encode("a <|im_start|> b").ids[1:] == ids


def as_json(llama):
    """The file that others make of Llama's model: every pair of pieces that makes a piece, in the order of scores."""
    model = pieces_of(llama)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    normal = {piece.piece for piece in model.pieces if piece.type == 1}
    merges = [
        (piece.piece[:i], piece.piece[i:])
        for piece in sorted((p for p in model.pieces if p.type == 1), key=lambda p: -p.score)
        for i in range(1, len(piece.piece))
        if {piece.piece[:i], piece.piece[i:]} <= normal
    ]
    special = [{"id": i, "content": name, "special": True} for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    return {
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def test_a_tokenizer_json_says_the_same(ours, llama, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(as_json(llama)))
    other = import_any_text_tokenizer(tmp_path, tmp_path / "ours", **PICTURES)
    assert other.engine.pieces == ours.engine.pieces
    for text in [*SOME, *TEXTS]:
        assert other.encode(text) == ours.encode(text), text


def test_a_tokenizer_json_that_merges_otherwise_is_refused(llama, tmp_path):
    path = tmp_path / "tokenizer.json"

    def refuse(change, message):
        file = as_json(llama)
        change(file)
        path.write_text(json.dumps(file))
        with pytest.raises(ValueError, match=message) as error:
            import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def swap(merges):
        merges[0], merges[-1] = merges[-1], merges[0]

    refuse(lambda file: file["model"]["merges"].pop(next(_several(file))), "of some of its parts only.*tokenizer.model")
    refuse(lambda file: file["model"]["merges"].append(file["model"]["merges"][0]), "stand apart")
    refuse(lambda file: file["model"].update(dropout=0.1), "model.dropout is 0.1")
    refuse(lambda file: file["normalizer"]["normalizers"].append({"type": "NFKC"}), "NFKC.*changes text")
    refuse(lambda file: file.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}), "pre_tokenizer")
    refuse(lambda file: file["model"]["merges"].append("abc"), "'abc', which is no pair")
    refuse(lambda file: file["model"]["vocab"].update(new=7), "ids of its pieces")
    refuse(lambda file: file["model"]["merges"].append("a" * 500 + " " + "b" * 501), "of more than 1,000 characters")
    refuse(lambda file: file.update(added_tokens=[{"content": ["x"], "id": 7}]), "not a tokenizer, or a damaged one")
    refuse(lambda file: file.update(pre_tokenizer=["x"]), "not a tokenizer, or a damaged one")
    refuse(lambda file: file["model"]["vocab"].update({"\ud800": len(file["model"]["vocab"])}), "not a tokenizer")


def _several(file):
    """Places of merges whose piece is made in several ways."""
    made = ["".join(merge.split(" ")) for merge in file["model"]["merges"]]
    return (place for place, piece in enumerate(made) if made.count(piece) > 1)


def changed(llama, change):
    model = pieces_of(llama)
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pieces.pop(5), "no piece for each byte"),
        (lambda model: model.pieces.add(piece="<s>", score=-1.0, type=1), "two pieces are spelled '<s>'"),
        (lambda model: model.pieces.pop(0), "not exactly one unknown piece"),
        (lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"x"), "changes text"),
    ],
)
def test_models_that_are_not_whole_or_change_text_are_refused(llama, change, message, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(changed(llama, change))
    with pytest.raises(ValueError, match=message):
        import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b'{"model": 1}'],
    ids=["empty", "noise", "length", "json"],
)
def test_hostile_files_are_refused_in_a_line(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="no tokenizer"):
        import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)


def test_a_unigram_model_is_exact_too(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_like_llama(model_type="unigram", hard_vocab_limit=False))
    tokenizer = import_any_text_tokenizer(path, tmp_path / "ours", **PICTURES)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*SOME, *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    shift = tokenizer.vocabulary.text_start - 3
    assert [i - shift for i in tokenizer.encode(" def match(self)")] == processor.encode("def match(self)")
