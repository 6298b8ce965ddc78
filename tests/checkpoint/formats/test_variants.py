"""What others have made of Hugging Face's layout: recognised, put into order, or refused."""

import json

import pytest
import torch
from converting import CASES, VOCABULARY, assert_same_tensors, convert_checkpoint, save_filled, tensors_of
from plain_weights import draw
from safetensors.torch import load_file, save_file

from megachameleon.config import load_config
from megachameleon.tokens.vocabulary import Vocabulary

ONE, FOUR = CASES


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """An export of each case, in one file."""
    folder = tmp_path_factory.mktemp("exports")
    for i, overrides in enumerate(CASES.values()):
        source = save_filled(overrides, draw(load_config("debug", overrides).model), folder / f"ours{i}")
        convert_checkpoint(("megatron", "hf"), source, folder / f"hf{i}")
    return {ONE: folder / "hf0", FOUR: folder / "hf1"}


@pytest.fixture
def changed(exports, tmp_path):
    """A copy of an export whose tensors and config.json a function has changed."""

    def change(case, tensors=lambda found: None, config=lambda values: None):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        found = load_file(exports[case] / "model.safetensors")
        tensors(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
        values = json.loads((exports[case] / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
        extra = json.loads((exports[case] / "megachameleon.json").read_text())
        del extra["sha256"]
        (folder / "megachameleon.json").write_text(json.dumps(extra))
        return folder

    return change


def norms(tensors):
    return [name for name in tensors if "q_norm" in name or "k_norm" in name]


def neighbours(rows, heads):
    """The inverse of what transformers' converter does to rows: Meta's order."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def test_lumina(changed, exports, tmp_path):
    def by_group(found):
        for name in norms(found):
            found[name] = found[name][:: len(found[name]) // 4]

    back = convert_checkpoint(("hf", "hf"), changed(FOUR, by_group), tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(exports[FOUR]))


def test_anole(changed, exports, tmp_path):
    def metas(found):
        for name in found:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                found[name] = neighbours(found[name], 8)
        for name in norms(found):
            found[name] = neighbours(found[name][0], 1)

    folder = changed(ONE, metas)
    assert load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_norm.bias"].shape == (16,)
    back = convert_checkpoint(("hf", "hf"), folder, tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(exports[ONE]))


def drift(found):
    """What training with transformers does: every head has a norm of its own."""
    found["model.layers.1.self_attn.k_norm.weight"][1] += 0.25


def test_heads_that_differ_are_refused_with_the_distance(changed, tmp_path):
    with pytest.raises(ValueError, match=r"differ in 1 QK-norm tensors \(by up to 0.25 in .*layers.1.*k_norm.weight"):
        convert_checkpoint(("hf", "megatron"), changed(FOUR, drift), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_heads_that_differ_fit_into_more_groups(changed, tmp_path):
    folder = changed(FOUR, drift)
    ours = convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours", qk_norm_groups=8)
    back = convert_checkpoint(("megatron", "hf"), ours, tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(folder))


def test_heads_that_differ_may_be_averaged(changed, tmp_path):
    folder = changed(FOUR, drift)
    back = convert_checkpoint(("hf", "hf"), folder, tmp_path / "back", average_qk_norm=True)
    name = "model.layers.1.self_attn.k_norm.weight"
    before, after = tensors_of(folder)[name], tensors_of(back)[name]
    torch.testing.assert_close(after[:2], before[:2].mean(0, keepdim=True).expand(2, -1), rtol=0, atol=1e-6)
    assert torch.equal(after[2:], before[2:])


def test_all_that_is_wrong_is_listed(changed, tmp_path):
    def wrong(found):
        found["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
        found["model.layers.1.mlp.up_proj.weight"] = torch.zeros(160, 64)
        del found["model.norm.weight"], found["lm_head.weight"]
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # of old releases; known

    with pytest.raises(ValueError) as caught:
        convert_checkpoint(("hf", "megatron"), changed(ONE, wrong), tmp_path / "ours")
    said = str(caught.value)
    assert "2 missing: model.norm.weight, lm_head.weight; 1 unknown: model.layers.0.self_attn.q_proj.bias" in said
    assert "1 of another shape: model.layers.1.mlp.up_proj.weight [160, 64] instead of [160, 128]" in said
    assert "inv_freq" not in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2', not 'chameleon'"),
        ("attention_bias", True, "attention_bias=True, and the decoder here has False"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps=1e-06, while"),
        ("rope_parameters", {"rope_type": "yarn"}, "RoPE of type 'yarn'"),
        ("num_hidden_layers", "2", "num_layers is '2', not a positive whole number"),
        ("num_hidden_layers", 3, "13 missing"),
        ("model_parallel_size", 3, "model.qk_norm_groups: 3 does not divide"),
        ("vocabulary_map", {"<pad>": 2}, "vocabulary_map disagrees with megachameleon.json: '<pad>' is 2 and not 1"),
    ],
)
def test_other_models_are_refused(changed, tmp_path, key, value, said):
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(
            ("hf", "megatron"), changed(ONE, config=lambda values: values.update({key: value})), tmp_path / "ours"
        )


def test_ids_without_a_meaning_need_a_tokenizer(changed, tmp_path):
    folder = changed(ONE)
    (folder / "megachameleon.json").unlink()
    with pytest.raises(ValueError, match="does not say what its ids mean"):
        convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours")
    (tmp_path / "tokenizer").mkdir()
    VOCABULARY.save(tmp_path / "tokenizer")
    convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours", tokenizer=tmp_path / "tokenizer")
    Vocabulary.compact(num_text_ids=170, num_image_codes=16, image_grid=(2, 4)).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="128 rows, but the vocabulary 256"):
        convert_checkpoint(("hf", "megatron"), folder, tmp_path / "other", tokenizer=tmp_path / "tokenizer")


def test_damaged_files_are_refused(exports, changed, tmp_path):
    folder = changed(ONE)
    data = (folder / "model.safetensors").read_bytes()
    for bad in (data[:-100], data[:4], b"PK" + data):
        (folder / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
            convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file '../model.safetensors', which is not beside it"):
        convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours")
