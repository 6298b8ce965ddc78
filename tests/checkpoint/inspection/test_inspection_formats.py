"""Every format is recognised and described; the same weights have the same hash and norms in each."""

import json
import math

import pytest
import torch
from converting import VOCABULARY, convert_checkpoint
from huggingface_writer import write_huggingface
from inspecting import content_hash, measured
from meta_writer import write_meta
from safetensors.torch import load_file, save_file
from three_formats import KINDS, SHAPES, Case, write

from megachameleon.checkpoint.inspection.opening import inspect


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_is_recognised(formats, inspected_case, kind):
    model = inspected_case.model
    report = inspect(formats[kind])
    assert (report.format, report.problems) == (kind, [])
    names = ("num_layers", "hidden_size", "num_query_groups", "ffn_hidden_size", "norm_order", "qk_norm_groups")
    assert all(getattr(report.model, name) == getattr(model, name) for name in names)
    assert report.weights["total"] == model.num_parameters
    assert report.weights["by_dtype"] == {"bfloat16": model.num_parameters}
    assert report.weights["by_part"]["QK-norm"] == model.num_layers * 4 * 4 * model.head_dim
    assert report.vocabulary["num_image_codes"] == VOCABULARY.num_image_codes
    json.dumps(report.as_plain(), allow_nan=False)


def test_all_formats_and_layouts_have_one_hash(formats, tmp_path):
    layout = {"tensor_parallel": 4, "pipeline_parallel": 2}
    again = convert_checkpoint(("megatron", "megatron"), formats["megatron"], tmp_path / "again", **layout)
    report = inspect(again)
    assert [len(report.files), report.problems] == [8 + 4, []]
    found = {content_hash(folder) for folder in (*formats.values(), again)}
    assert len(found) == 1 and None not in found


def test_a_wider_type_with_the_same_values_has_the_same_hash(formats, inspected_case, tmp_path):
    wide = Case(inspected_case.overrides)
    wide.__dict__["weights"] = inspected_case.weights  # rounded to bf16 already
    folder = write("meta", tmp_path / "wide", wide)
    assert inspect(folder).weights["by_dtype"].keys() == {"float32"}
    assert content_hash(folder) == content_hash(formats["meta"])


def test_one_bit_changes_the_hash(formats, tmp_path):
    tensors = load_file(formats["hf"] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[0, 0] ^= 1
    folder = tmp_path / "changed"
    folder.mkdir()
    for name in ("config.json", "megachameleon.json"):
        (folder / name).write_bytes((formats["hf"] / name).read_bytes())
    save_file(tensors, folder / "model.safetensors")
    assert content_hash(folder) != content_hash(formats["hf"])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_weights(formats, inspected_case, kind):
    _, found = measured(formats[kind], "layers.1.*")
    model, weights = inspected_case.model, inspected_case.weights
    for name in ("q", "o", "up", "ffn_norm"):  # norms do not know in which order rows stand
        values, numbers = weights[f"1.{name}"].double(), found.numbers[f"layers.1.{name}"]
        expected = (values.norm(), values.mean(), values.std(correction=0), values.min(), values.max())
        got = (numbers.norm, numbers.mean, numbers.std, numbers.least, numbers.most)
        assert got == pytest.approx([float(value) for value in expected], rel=1e-9, abs=1e-15), name
    heads = model.num_query_groups // model.qk_norm_groups
    k_norm = float(weights["1.k_norm.weight"].double().norm()) * math.sqrt(heads)
    assert found.numbers["layers.1.k_norm.weight"].norm == pytest.approx(k_norm)


def test_zeros_and_values_that_are_not_finite_are_counted(tmp_path):
    values = torch.arange(-5.0, 6.0)
    values[0], values[1], values[2] = float("nan"), float("inf"), 0.0
    path = tmp_path / "few.safetensors"
    save_file({"some": values, "all": torch.full((3,), float("inf"))}, path)
    report, found = measured(path)
    numbers = found.numbers["some"]
    assert (numbers.not_finite, numbers.zeros, numbers.least, numbers.most) == (2, 2, -2.0, 5.0)
    assert found.numbers["all"].not_finite == 3 and found.numbers["all"].norm == 0
    assert sorted(report.problems) == ["all: 3 values are not finite", "some: 2 values are not finite"]


@pytest.mark.parametrize(
    ("variant", "shape", "said"),
    [("transformers", "34B", "each head"), ("lumina", "34B", "Lumina"), ("anole", "7B", "anole")],
)
def test_variants_of_hugging_face(tmp_path, variant, shape, said):
    case = Case(SHAPES[shape])
    folder = write_huggingface(
        tmp_path / variant, case.model, case.weights, vocabulary=VOCABULARY, files=3, variant=variant
    )
    meta = write_meta(
        tmp_path / "meta", case.model, case.weights, shards=case.model.qk_norm_groups, vocabulary=VOCABULARY
    )
    report = inspect(folder)
    assert said in report.sections["model"]["qk_norm_stored_as"]
    assert report.model.qk_norm_groups == case.model.qk_norm_groups
    assert report.weights["total"] == case.model.num_parameters
    assert content_hash(folder) == content_hash(meta)


def test_heads_that_left_their_group_are_told(tmp_path):
    case = Case(SHAPES["34B"])
    folder = write_huggingface(tmp_path / "hf", case.model, case.weights, vocabulary=VOCABULARY)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.bias"][3] += 0.5
    save_file(tensors, folder / "model.safetensors")
    told = inspect(folder).sections["model"]["qk_norm_largest_distance_in_a_group"]
    assert told == pytest.approx(0.5, rel=1e-5)


def test_llama(tmp_path):
    case = Case(SHAPES["7B"])
    folder = write_huggingface(tmp_path / "llama", case.model, case.weights, vocabulary=VOCABULARY)
    path = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "_norm." not in name or "layernorm" in name}, path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "llama", "rms_norm_eps": 1e-6}))
    report = inspect(folder)
    assert "Llama" in report.what and report.problems == []
    assert (report.model.qk_norm, report.model.norm_eps) == ("none", 1e-6)
    assert report.weights["total"] == case.model.num_parameters - 4 * case.model.num_layers * case.model.head_dim


def test_other_models_and_single_files(tmp_path):
    tensors = {"bert.encoder.layer.0.attention.query.weight": torch.ones(4, 3), "pooler": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 3}')
    report = inspect(tmp_path)
    assert "'bert'" in report.what and report.plain is None and report.weights["total"] == 14
    torch.save({"state_dict": tensors, "step": 5}, tmp_path / "alone.pth")
    single = inspect(tmp_path / "alone.pth")
    assert single.sections["metadata"] == {"step": 5}
    assert single.stored.infos["state_dict.pooler"].shape == (2,)
    assert torch.equal(single.stored.read("state_dict.pooler"), torch.ones(2))
    assert inspect(tmp_path / "model.safetensors").weights["total"] == 14
    for folder, message in ((tmp_path / "none", "no such file"), (tmp_path / "empty", "no checkpoint")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            inspect(folder)


def test_what_ours_tells_of_its_state(formats, inspected_case):
    report = inspect(formats["megatron"])
    assert report.sections["checkpoints"] == {"step_00000007": "whole"}
    assert report.sections["progress"]["step"] == 7 and report.sections["progress"]["consumed_samples"] == 56
    assert report.sections["state"]["holds"] == "weights only"
    assert report.sections["layout"]["tensor_parallel"] == 1
    (weights,) = [file for file in report.files if file.num_tensors]
    assert weights.holds.startswith(f"layers 0-{inspected_case.model.num_layers - 1}, embedding, final norm, head, ")
    assert report.tokenizers == {"text": "t", "image": "i"}


def test_a_llama_of_another_kind_is_shown_as_plain_tensors(tmp_path):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    settings = {"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 4}
    settings |= {"num_attention_heads": 1, "intermediate_size": 3, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    report = inspect(tmp_path)
    assert report.plain is None and report.problems == []
    assert "tie_word_embeddings=True" in report.notes[0] and report.weights["by_part"] == {"feed-forward": 12}
