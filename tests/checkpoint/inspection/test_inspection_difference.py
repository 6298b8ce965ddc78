"""Two checkpoints of whatever formats: equal, or what differs and by how much."""

import json

import pytest
import torch
from converting import VOCABULARY, convert_checkpoint
from huggingface_writer import write_huggingface
from inspecting import as_json, copy_of, run_tool_here
from meta_writer import write_meta
from safetensors.torch import load_file, save_file
from three_formats import KINDS, SHAPES, Case

STORED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def changed(formats, tmp_path):
    """A copy of the Hugging Face folder whose tensors a function has changed."""

    def change(function):
        folder = copy_of(formats["hf"], tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return change


@pytest.mark.parametrize("other", KINDS)
def test_formats_are_equal(formats, other, capsys, inspected_case):
    status, found = as_json(capsys, "--diff", formats["meta"], formats[other])
    assert (status, found["equal"], found["names"]) == (0, True, "plain")
    assert not any(setting["counts"] for setting in found["settings"])  # Meta's does not say context_length
    assert found["counts"] == {"equal": 3 + 13 * inspected_case.model.num_layers}


def test_layouts_are_equal(formats, tmp_path, capsys):
    again = convert_checkpoint(("megatron", "megatron"), formats["megatron"], tmp_path / "again", tensor_parallel=8)
    assert as_json(capsys, "--diff", formats["megatron"], again)[0] == 0


def test_one_tensor_that_differs_is_measured(formats, changed, capsys):
    def shift(tensors):
        tensors[STORED] = tensors[STORED] * 1.5
        tensors["lm_head.weight"][3, 4] += 0.25

    folder = changed(shift)
    before, after = (load_file(f / "model.safetensors")[STORED].double() for f in (formats["hf"], folder))
    status, found = as_json(capsys, "--diff", formats["megatron"], folder)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    one = by_name["layers.1.up"]
    assert (status, found["equal"], found["counts"]["different"]) == (1, False, 2)
    assert one["largest"] == pytest.approx(float((before - after).abs().max()))
    assert one["relative"] == pytest.approx(float((before - after).norm() / before.norm()))
    assert one["cosine"] == pytest.approx(float(before.flatten() @ after.flatten() / before.norm() / after.norm()))
    run_tool_here("--diff", formats["megatron"], folder)
    said = capsys.readouterr().out
    assert said.index("layers.1.up ") < said.index("head ") and said.rstrip().endswith("different")


def test_tolerance(formats, changed, capsys):
    def shift(tensors):
        tensors[STORED] = (tensors[STORED].float() * 1.01).bfloat16()

    folder = changed(shift)
    relative = max(t["relative"] for t in as_json(capsys, "--diff", formats["hf"], folder)[1]["tensors"])
    assert 0.005 < relative < 0.02
    assert run_tool_here("--diff", formats["hf"], folder, "--tolerance", "0.02") == 0
    assert run_tool_here("--diff", formats["hf"], folder, "--tolerance", "0.005") == 1


def test_another_type_with_the_same_values_is_equal(formats, changed, capsys):
    def widen(tensors):
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    status, found = as_json(capsys, "--diff", formats["hf"], changed(widen))
    assert status == 0 and found["counts"].keys() == {"same values"}


def test_other_numbers_of_groups_are_compared_by_head(tmp_path, capsys):
    case = Case(SHAPES["34B"])
    few = write_meta(tmp_path / "few", case.model, case.weights, shards=4, vocabulary=VOCABULARY)
    many = write_meta(tmp_path / "many", case.model, case.weights, shards=8, vocabulary=VOCABULARY)
    status, found = as_json(capsys, "--diff", few, many)
    assert status == 0 and found["counts"].keys() == {"equal"}
    (groups,) = found["settings"]
    assert (groups["name"], groups["one"], groups["other"], groups["counts"]) == ("model.qk_norm_groups", 4, 8, False)


def test_missing_extra_and_misshapen(tmp_path, capsys):
    for name, shape in (("a", {"x": (2,), "y": (3,), "z": (4,)}), ("b", {"y": (3,), "z": (5,), "w": (1,)})):
        save_file({key: torch.ones(size) for key, size in shape.items()}, tmp_path / f"{name}.safetensors")
    status, found = as_json(capsys, "--diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    statuses = {tensor["name"]: tensor["status"] for tensor in found["tensors"]}
    assert (status, found["names"]) == (1, "as stored")
    assert statuses == {"x": "only in A", "y": "equal", "z": "shape", "w": "only in B"}


def test_values_that_are_not_finite_differ(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", float("nan"))):
        save_file({"x": torch.tensor([1.0, value])}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    status, found = as_json(capsys, "--diff", *paths, "--tolerance", "0.9")
    assert status == 1 and found["tensors"][0]["largest"] is None
    assert run_tool_here("--diff", paths[1], paths[1]) == 0


def test_another_vocabulary_or_norm_order_is_another_model(formats, tmp_path, capsys):
    vocabulary = copy_of(formats["hf"], tmp_path / "vocabulary")
    extra = json.loads((vocabulary / "megachameleon.json").read_text())
    extra["vocabulary"]["image_grid"] = [4, 2]
    (vocabulary / "megachameleon.json").write_text(json.dumps(extra))
    order = copy_of(formats["hf"], tmp_path / "order")
    settings = json.loads((order / "config.json").read_text())
    (order / "config.json").write_text(json.dumps(settings | {"swin_norm": False}))
    for folder, name in ((vocabulary, "vocabulary.image_grid"), (order, "model.norm_order")):
        status, found = as_json(capsys, "--diff", formats["meta"], folder)
        assert status == 1 and found["counts"].keys() == {"equal"}
        assert [setting["name"] for setting in found["settings"] if setting["counts"]] == [name]


def test_what_is_damaged_is_not_equal(formats, tmp_path, capsys):
    folder = copy_of(formats["meta"], tmp_path / "meta")
    (folder / "consolidated.03.pth").unlink()
    status, found = as_json(capsys, "--diff", formats["meta"], folder)
    assert status == 1 and found["counts"].keys() == {"unreadable"} and found["problems"]["b"]


def test_a_chameleon_that_was_a_llama(tmp_path, capsys):
    case = Case(SHAPES["7B"])
    chameleon = write_huggingface(tmp_path / "chameleon", case.model, case.weights, vocabulary=VOCABULARY)
    llama = copy_of(chameleon, tmp_path / "llama")
    tensors = load_file(llama / "model.safetensors")
    norms = [name for name in tensors if ".q_norm." in name or ".k_norm." in name]
    save_file({name: t for name, t in tensors.items() if name not in norms}, llama / "model.safetensors")
    settings = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    status, found = as_json(capsys, "--diff", llama, chameleon)
    assert status == 1 and found["counts"]["only in B"] == len(norms) and "different" not in found["counts"]


def test_masters_are_what_an_export_in_fp32_holds(formats, tmp_path, capsys):
    """A checkpoint to which masters are added by hand: twice the weights, so that nothing else is equal to them."""
    run = copy_of(formats["megatron"], tmp_path / "run")
    checkpoint = next(run.glob("step_*"))
    stored = load_file(checkpoint / "tensors_00000.safetensors")
    masters = {f"optimizer.master.{name}": tensor.float() * 2 for name, tensor in stored.items()}
    save_file(masters, checkpoint / "tensors_00001.safetensors")
    index = json.loads((checkpoint / "index.json").read_text())
    for key, entry in list(index.items()):
        parts = [["tensors_00001.safetensors", f"optimizer.master.{name}", *box] for _, name, *box in entry["parts"]]
        index[f"optimizer.master.{key}"] = {**entry, "dtype": "float32", "parts": parts}
    (checkpoint / "index.json").write_text(json.dumps(index))
    export = copy_of(formats["hf"], tmp_path / "export")
    doubled = {name: tensor.float() * 2 for name, tensor in load_file(export / "model.safetensors").items()}
    save_file(doubled, export / "model.safetensors")
    assert as_json(capsys, "--diff", run, export, "--masters")[1]["counts"].keys() == {"equal"}
    assert as_json(capsys, "--diff", run, export)[1]["counts"].keys() == {"different"}
    with pytest.raises(ValueError, match="has no fp32 masters"):
        run_tool_here(export, "--masters")
    _, found = as_json(capsys, run, "--stored", "--tensors", "optimizer.master.*", "--norms")
    assert found["names"] == "as stored" and all(name.startswith("optimizer.master.") for name in found["numbers"])


def test_a_picture_encoder_beside_the_decoder(formats, changed, capsys):
    def add(tensors):
        tensors["model.vqmodel.encoder.conv_in.weight"] = torch.ones(2, 3)

    folder = changed(add)
    status, found = as_json(capsys, "--diff", folder, formats["meta"])
    told = {setting["name"]: setting for setting in found["settings"]}["picture encoder"]
    assert status == 0 and (told["one"], told["other"], told["counts"]) == (True, False, False)
    assert as_json(capsys, "--diff", folder, folder)[1]["tensors"][-1]["name"].startswith("model.vqmodel.")
    assert as_json(capsys, folder)[1]["parameters"]["by_part"]["picture encoder"] == 6


def test_the_same_bits_in_another_type_are_other_values(tmp_path, capsys):
    bits = torch.tensor([0x3F80, 0x4000], dtype=torch.int16)
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16)):
        save_file({"x": bits.view(dtype)}, tmp_path / f"{name}.safetensors")
    status, found = as_json(capsys, "--diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 1 and found["counts"] == {"different": 1}
