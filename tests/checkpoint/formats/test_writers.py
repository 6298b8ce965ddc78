"""The writers that stand for Meta's and Hugging Face's own files agree with each other and with transformers."""

import pytest
import torch
from converting import CASES, VOCABULARY
from huggingface_writer import read_huggingface, write_huggingface
from meta_oracle import meta_logits
from meta_writer import read_meta, read_shards, write_meta
from plain_weights import draw, draw_tokens

from megachameleon.config import load_config


@pytest.mark.parametrize("case", CASES)
def test_both_give_back_what_was_written(case, tmp_path):
    model = load_config("debug", CASES[case]).model
    weights = draw(model)
    meta = write_meta(tmp_path / "meta", model, weights, shards=model.qk_norm_groups, vocabulary=VOCABULARY)
    hf = write_huggingface(tmp_path / "hf", model, weights, vocabulary=VOCABULARY, files=3)
    for found in (read_meta(meta, model), read_huggingface(hf, model)):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    shards = read_shards(meta)
    assert len(shards) == model.qk_norm_groups
    assert shards[-1]["layers.1.attention.wk.weight"].shape == (8 * model.head_dim // len(shards), 128)
    assert shards[-1]["tok_embeddings.weight"].shape == (128, 128 // len(shards))


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_meta_does(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="an oracle of the tests only")
    model = load_config("debug", CASES[case]).model
    weights, tokens = draw(model), draw_tokens(model)
    hf = write_huggingface(tmp_path / "hf", model, weights, vocabulary=VOCABULARY)
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(hf).eval()
    with torch.no_grad():
        logits = theirs.model(input_ids=tokens, use_cache=False).last_hidden_state @ theirs.lm_head.weight.T
    torch.testing.assert_close(logits, meta_logits(model, weights, tokens), rtol=0, atol=1e-5)
