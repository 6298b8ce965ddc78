"""Rows of embedding and head: padded, trimmed, extended, and only when asked for."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from converting import CASES, TOKENIZERS, VOCABULARY, convert_checkpoint, save_filled, tensors_of
from plain_weights import draw, draw_tokens
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.folder import read_manifest, resolve_checkpoint
from megachameleon.checkpoint.formats.new_rows import new_rows
from megachameleon.checkpoint.formats.plain import whole
from megachameleon.checkpoint.formats.registry import Options, open_source
from megachameleon.checkpoint.loading import saved_config
from megachameleon.checkpoint.verifying.verification import logits_of
from megachameleon.config import load_config
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    overrides = CASES["pre-norm, 1 group"]
    weights = draw(load_config("debug", overrides).model)
    return save_filled(overrides, weights, tmp_path_factory.mktemp("rows") / "ours")


@pytest.fixture(scope="module")
def hf(ours):
    return convert_checkpoint(("megatron", "hf"), ours, ours.parent / "hf")


@pytest.fixture(scope="module")
def padded(ours):
    """A table of 192 rows for 128 ids, as others pad it."""
    return convert_checkpoint(("megatron", "hf"), ours, ours.parent / "padded", vocab_size=192)


def test_padding_adds_rows_and_changes_none(hf, padded):
    before, after = tensors_of(hf), tensors_of(padded)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert len(after[name]) == len(tensor) + 64 * (name in TABLES)
    settings = json.loads((padded / "config.json").read_text())
    assert settings["vocab_size"] == 192 and max(settings["vocabulary_map"].values()) < 128


def test_a_padded_table_is_refused_with_its_remedy(padded, tmp_path):
    with pytest.raises(
        ValueError, match=r"have 192 rows, but the vocabulary 128 ids.*--vocab-size 128, which leaves out"
    ):
        convert_checkpoint(("hf", "megatron"), padded, tmp_path / "again")
    again = convert_checkpoint(("hf", "megatron"), padded, tmp_path / "again", vocab_size=128)
    assert read_manifest(resolve_checkpoint(again)).vocabulary["size"] == 128


def test_trimming_gives_back_what_there_was(ours, padded, tmp_path):
    again = convert_checkpoint(("hf", "megatron"), padded, tmp_path / "again", vocab_size=128, tensor_parallel=2)
    direct = convert_checkpoint(("megatron", "megatron"), ours, tmp_path / "direct", tensor_parallel=2)
    before, after = tensors_of(direct / "step_00000000"), tensors_of(again / "step_00000000")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_old_ids_keep_their_logits_and_new_ones_take_their_share_at_most(ours, padded):
    tokens = draw_tokens(load_config("debug", CASES["pre-norm, 1 group"]).model)
    before = logits_of("megatron", ours, tokens, torch.float32)
    after = logits_of("hf", padded, tokens, torch.float32)
    torch.testing.assert_close(after[..., :128], before, rtol=0, atol=1e-5)
    share = after.softmax(-1)[..., 128:].sum(-1)
    assert share.mean() < 64 / 192  # k / (n + k)


def test_new_rows_are_the_same_whoever_reads_them(ours):
    """Whole, or in the boxes of a tensor-parallel layout, which may cut columns too."""
    source = open_source("megatron", ours, Options(vocab_size=192))
    for name in ("embedding", "head"):
        box = whole(name, (192, 128)).box
        table = source.read(name, box)
        for offset, shape in (((100, 0), (40, 128)), ((128, 7), (64, 3)), ((130, 0), (1, 128)), ((0, 5), (192, 2))):
            part = source.read(name, type(box)(offset, shape))
            rows, columns = (slice(a, a + n) for a, n in zip(offset, shape, strict=True))
            assert torch.equal(part, table[rows, columns])
        assert len(table.unique(dim=0)) == 192


def test_new_rows_stand_around_the_mean_of_text(ours):
    source = open_source("megatron", ours, Options(vocab_size=128 + 512))
    table = source.read("head", whole("head", (640, 128)).box)
    text, new = table[VOCABULARY.text_start : 128], table[128:]
    deviation = text.std(0, correction=0)
    torch.testing.assert_close(new.mean(0), text.mean(0), rtol=0, atol=0.03 * deviation.max().item())
    assert ((new - text.mean(0)) / deviation).std() == pytest.approx(0.1, rel=0.05)


def test_the_mean_is_that_of_all_blocks():
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    rows = new_rows("head", table.split(7))
    torch.testing.assert_close(rows.mean, table.mean(0))
    torch.testing.assert_close(rows.deviation, table.std(0, correction=0))


def test_a_longer_table_of_ours_is_a_longer_vocabulary(ours, tmp_path):
    """In our own format every row is an id; no tokenizer is known that has these."""
    longer = convert_checkpoint(("megatron", "megatron"), ours, tmp_path / "longer", vocab_size=192)
    manifest = read_manifest(resolve_checkpoint(longer))
    assert manifest.vocabulary["size"] == 192 and manifest.vocabulary["text_start"] == VOCABULARY.text_start
    assert manifest.tokenizers == {**TOKENIZERS, "text": None}
    assert saved_config(resolve_checkpoint(longer)).model.vocab_size == 192


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (120, r"would cut 8 text pieces off .*; give at least --vocab-size 128, or with --tokenizer .* of 120 ids"),
        (10, r"would cut 105 text pieces and 10 picture codes and the control ids .*begin_image.*at least .* 128$"),
    ],
)
def test_ids_in_use_are_not_cut(ours, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "cut", vocab_size=rows)


def longer_tokenizer(folder, *, more):
    """A folder whose vocabulary has other text ids; its text is never asked for."""
    replace(VOCABULARY, size=128 + more).save(folder)
    return folder


def test_a_tokenizer_with_more_ids_makes_a_longer_vocabulary(ours, hf, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTokenizer, "load", lambda folder: SimpleNamespace(fingerprint="longer"))
    longer = longer_tokenizer(tmp_path / "longer", more=64)
    for kind, source in (("megatron", ours), ("hf", hf)):
        options = {"tokenizer": longer, "vocab_size": 192}
        made = convert_checkpoint((kind, "megatron"), source, tmp_path / kind, **options)
        manifest = read_manifest(resolve_checkpoint(made))
        assert (manifest.vocabulary["size"], manifest.tokenizers["text"]) == (192, "longer")
    shorter = open_source("megatron", ours, Options(tokenizer=longer_tokenizer(longer, more=-8), vocab_size=120))
    assert shorter.description.vocabulary["size"] == 120
    replace(VOCABULARY, size=192, unk=2, eos=3).save(longer)
    with pytest.raises(ValueError, match=r"eos=2 but that of .* has 3"):
        open_source("megatron", ours, Options(tokenizer=longer, vocab_size=192))


def test_rows_that_do_not_divide_are_refused(ours, tmp_path):
    with pytest.raises(ValueError, match=r"tensor_parallel: 8 .*model\.vocab_size"):
        convert_checkpoint(("megatron", "megatron"), ours, tmp_path / "odd", vocab_size=130, tensor_parallel=8)


def test_what_was_done_is_said(ours, padded):
    notes = open_source("megatron", ours, Options(vocab_size=192)).description.notes
    assert "64 new rows behind 128" in notes[-2] and "64 rows have no id in the vocabulary of 128" in notes[-1]
    assert "last 64 of 192 rows" in open_source("hf", padded, Options(vocab_size=128)).description.notes[-1]
    unchanged = open_source("megatron", ours, Options(vocab_size=128)).description
    assert unchanged.notes == open_source("megatron", ours, Options()).description.notes


def test_an_unknown_vocabulary_is_cut_with_a_warning(padded, tmp_path):
    unknown = shutil.copytree(padded, tmp_path / "unknown")
    (unknown / "megachameleon.json").unlink()
    source = open_source("hf", unknown, Options(vocab_size=100))
    assert "nothing here says it" in source.description.notes[-1] and source.description.model.vocab_size == 100


def test_a_release_with_padding_is_recognised(hf, tmp_path):
    """65,600 rows, but names for Chameleon's 65,536 ids."""
    release = shutil.copytree(hf, tmp_path / "release")
    (release / "megachameleon.json").unlink()
    tensors = load_file(release / "model.safetensors")
    for name in TABLES:
        tensors[name] = torch.zeros(65_600, 128)
    save_file(tensors, release / "model.safetensors", {"format": "pt"})
    settings = json.loads((release / "config.json").read_text())
    from megachameleon.checkpoint.formats.huggingface.names import vocabulary_map

    names = vocabulary_map(Vocabulary(), None) | {f"piece {i}": i for i in range(16_384, 65_536)}
    (release / "config.json").write_text(json.dumps(settings | {"vocab_size": 65_600, "vocabulary_map": names}))
    with pytest.raises(ValueError, match="--vocab-size 65536"):
        open_source("hf", release, Options())
    assert open_source("hf", release, Options(vocab_size=65_536)).description.model.vocab_size == 65_536
    names |= {"an added one": 65_536}  # then the last rows are no padding
    (release / "config.json").write_text(json.dumps(settings | {"vocab_size": 65_600, "vocabulary_map": names}))
    assert open_source("hf", release, Options()).description.vocabulary is None
