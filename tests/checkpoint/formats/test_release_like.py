"""A folder as transformers writes it, with the ids of Chameleon's release: imported, exported, with its tokenizer."""

import json

import pytest
import torch
from converting import CASES, VOCABULARY, assert_same_tensors, convert_checkpoint, save_filled, tensors_of
from plain_weights import draw

from megachameleon.checkpoint.folder import parse_manifest, resolve_checkpoint
from megachameleon.checkpoint.loading import saved_vocabulary
from megachameleon.checkpoint.verifying.verification import logits_of, some_tokens
from megachameleon.config import load_config
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.piece_names import special_names
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers", reason="an oracle of the tests only")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A tiny model with 65,536 ids and four groups of QK-norm, saved by transformers in several files."""
    from huggingface_oracle import TINY_VQ

    names = {name: i for i, name in enumerate(special_names(Vocabulary()))}
    names["<image>"] = names.pop("<reserved08707>")
    config = transformers.ChameleonConfig(
        vocab_size=65536, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, model_parallel_size=4, swin_norm=True, vocabulary_map=names, bos_token_id=0,
        pad_token_id=1, vq_config={**TINY_VQ, "channel_multiplier": [1, 1], "num_embeddings": 8192, "resolution": 64},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name or "lm_head" in name:  # every part of the model must show in its logits
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            if "vqmodel" not in name and "norm" in name:
                rows = 0.3 * torch.randn(4, 4) if parameter.dim() == 2 else 0.3 * torch.randn(32)
                parameter.add_(rows.repeat_interleave(len(parameter) // len(rows), 0))
    folder = tmp_path_factory.mktemp("release")
    model.save_pretrained(folder, max_shard_size="4MB")
    return folder


def test_it_is_imported(release, tmp_path):
    assert (release / "model.safetensors.index.json").exists()
    ours = convert_checkpoint(("hf", "megatron"), release, tmp_path / "ours", tensor_parallel=2)
    tokens = some_tokens(65536)
    theirs, mine = (
        logits_of(kind, path, tokens, torch.float32) for kind, path in (("hf", release), ("megatron", ours))
    )
    assert 0.5 < theirs.std() < 2
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    checkpoint = resolve_checkpoint(ours)
    assert saved_vocabulary(checkpoint, parse_manifest(checkpoint)) == Vocabulary()


def test_it_is_exported_again_with_its_picture_encoder(release, tmp_path):
    again = convert_checkpoint(("hf", "hf"), release, tmp_path / "again", shard_bytes=10_000_000)
    before, after = tensors_of(release), tensors_of(again)
    assert_same_tensors(dict(sorted(after.items())), dict(sorted(before.items())))
    assert json.loads((again / "config.json").read_text())["vocabulary_map"]["<image>"] == 8711


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A text tokenizer of a vocabulary of 320 ids, and a checkpoint that goes with it."""
    folder = tmp_path_factory.mktemp("text")
    vocabulary = Vocabulary.compact(num_text_ids=297, num_image_codes=16, image_grid=(2, 4))
    train_text_tokenizer([f"red green blue {n} squares" for n in range(50)], vocabulary, folder / "tokenizer")
    return folder / "tokenizer"


def test_the_text_tokenizer_goes_with_it(tokenizer, tmp_path, monkeypatch):
    import converting

    text = TextTokenizer.load(tokenizer)
    monkeypatch.setattr(converting, "VOCABULARY", text.vocabulary)
    overrides = [*CASES["pre-norm, 1 group"], f"model.vocab_size={text.vocabulary.size}", f"data.tokenizer={tokenizer}"]
    weights = draw(load_config("debug", overrides).model)
    source = save_filled(overrides, weights, tmp_path / "other")
    with pytest.raises(ValueError, match=r"is another text tokenizer .* than the one that made the data"):
        convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", tokenizer=tokenizer)
    plain = convert_checkpoint(("megatron", "hf"), source, tmp_path / "plain")
    assert not (plain / "tokenizer.json").exists()
    monkeypatch.setitem(converting.TOKENIZERS, "text", text.fingerprint)
    source = save_filled(overrides, weights, tmp_path / "ours")
    hf = convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf")  # by the run's own data.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert theirs("green 7 squares").input_ids == [text.vocabulary.bos, *text.encode("green 7 squares")]
    names = json.loads((hf / "config.json").read_text())["vocabulary_map"]
    assert len(names) == text.vocabulary.size and sorted(names.values()) == list(range(text.vocabulary.size))
    again = convert_checkpoint(("hf", "hf"), hf, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer, tmp_path):
    overrides = CASES["pre-norm, 1 group"]
    source = save_filled(overrides, draw(load_config("debug", overrides).model), tmp_path / "ours")
    with pytest.raises(ValueError, match=rf"has size={VOCABULARY.size} but that of"):
        convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", tokenizer=tokenizer)
