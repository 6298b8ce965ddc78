"""Damaged, unfinished and hostile checkpoints: what is wrong is said in a line, the rest is still shown."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from inspecting import as_json, checkpoint_in, copy_of, measured, run_tool_here
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.inspection import raw_torch
from megachameleon.checkpoint.inspection.checking import check_files
from megachameleon.checkpoint.inspection.opening import inspect
from megachameleon.checkpoint.inspection.raw import SafetensorsFile


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, entries, data):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def cut(formats, tmp_path):
    """A Hugging Face folder whose only file has lost its second half."""
    folder = copy_of(formats["hf"], tmp_path / "cut")
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return folder


def test_what_is_left_of_a_truncated_file_is_read(formats, cut):
    whole = load_file(formats["hf"] / "model.safetensors")
    file = SafetensorsFile(cut / "model.safetensors")
    readable = [name for name, tensor in file.tensors.items() if not tensor.problem]
    assert 0 < len(readable) < len(whole) == len(file.tensors)
    assert all(torch.equal(file.read(name), whole[name]) for name in readable)
    report, found = measured(cut)
    assert len(found.numbers) == len(readable) and found.content_hash is None
    assert any("truncated" in problem for problem in report.problems)
    assert any(f"{len(whole) - len(readable)} of {len(whole)} tensors cannot be read" in p for p in report.problems)


def test_parts_of_a_tensor_are_read_like_slices(tmp_path):
    values = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    save_file({"x": values, "scalar": torch.tensor(3.0), "none": torch.empty(0, 3)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for part in (
        (slice(0, 1), slice(1, 2), slice(0, 2), slice(1, 3)),
        (slice(0, 1), slice(0, 2), slice(2, 3), slice(0, 4)),
    ):
        assert torch.equal(file.read("x", part), values[part])
    assert file.read("scalar") == 3 and file.read("none").shape == (0, 3)


def test_a_lost_file_of_ours_leaves_the_rest(formats, tmp_path):
    from converting import convert_checkpoint

    run = convert_checkpoint(("megatron", "megatron"), formats["megatron"], tmp_path / "run", pipeline_parallel=2)
    checkpoint = checkpoint_in(run)
    (checkpoint / "tensors_00001.safetensors").unlink()
    report, found = measured(run)
    assert report.path == checkpoint
    assert "tensors_00001.safetensors: is missing" in report.problems
    assert report.sections["checkpoints"] == {checkpoint.name: "damaged"}
    assert "embedding" in found.numbers and "head" not in found.numbers


def test_a_changed_byte_is_found_by_check_alone(formats, tmp_path):
    for kind, name in (("megatron", "tensors_00000.safetensors"), ("meta", "consolidated.01.pth")):
        folder = copy_of(formats[kind], tmp_path / kind)
        path = next(folder.rglob(name))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        report = inspect(folder)
        assert report.problems == []
        states = check_files(report, lambda count: None)
        assert [known for known, state in states.items() if state == "changed"] == [name]
        assert len(report.problems) == 1 and report.problems[0].startswith(f"{name}: its ")
    whole = inspect(formats["meta"])
    assert set(check_files(whole, lambda count: None).values()) == {"as it should be"} and not whole.problems


def test_without_a_manifest(formats, tmp_path):
    folder = copy_of(formats["megatron"], tmp_path / "run")
    (checkpoint_in(folder) / "manifest.json").unlink()
    report, found = measured(folder)
    assert "manifest.json: is missing, so no run takes it for a checkpoint" in report.problems
    assert report.sections["checkpoints"] == {"step_00000007": "without a manifest"}
    assert found.content_hash == measured(formats["megatron"])[1].content_hash


def test_an_attempt_that_was_not_finished(formats, tmp_path):
    attempt = tmp_path / "checkpoints" / ".step_00000100.host-12-abcd-1.tmp"
    copy_of(checkpoint_in(formats["megatron"]), attempt)
    for name in ("manifest.json", "index.json", "config.yaml"):
        (attempt / name).unlink()
    (attempt / "record_00000.json").write_text("{}")
    for path in (attempt, tmp_path):
        report, found = measured(path)
        assert report.what.startswith(
            "step_00000100 of this project: an attempt to save that was not finished; 1 ranks"
        )
        assert any(name.startswith("decoder.layers.mlp.linear_fc1.weight@1,0,0") for name in found.numbers)


def test_set_aside_and_older_ones(formats, tmp_path):
    copy_of(checkpoint_in(formats["megatron"]), tmp_path / "step_00000005")
    aside = copy_of(checkpoint_in(formats["megatron"]), tmp_path / "step_00000009.damaged")
    assert "found damaged and set aside" in inspect(aside).what
    states = inspect(tmp_path).sections["checkpoints"]
    assert states == {"step_00000005": "whole", "step_00000009.damaged": "damaged, set aside"}


def test_an_unfinished_conversion(formats, tmp_path):
    folder = tmp_path / ".mine.converting"
    for name in ("records", "checked"):
        (folder / name).mkdir(parents=True)
    (folder / "checked" / "tensors_00000.safetensors.0a1b").touch()  # a file of the source whose hash was compared
    (folder / "conversion.json").write_text('{"source": "/some/where"}')
    data = (formats["hf"] / "model.safetensors").read_bytes()
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    (folder / "model-00002-of-00002.safetensors.partial").write_bytes(data[: len(data) // 2])
    (folder / "records" / "model-00001-of-00002.safetensors.json").write_text("{}")
    report = inspect(folder)
    assert report.what == "an unfinished conversion to mine: 1 files are finished"
    assert report.sections["conversion"]["source"] == "/some/where"
    assert {file.name: file.holds for file in report.files} == {
        "model-00001-of-00002.safetensors": "finished",
        "model-00002-of-00002.safetensors.partial": "begun",
    }


def test_a_lost_file_of_metas(formats, tmp_path):
    folder = copy_of(formats["meta"], tmp_path / "meta")
    (folder / "consolidated.02.pth").unlink()
    report, found = measured(folder)
    assert "1 of 4 files are missing: consolidated.02.pth" in report.problems
    assert report.model.qk_norm_groups == 4 and not found.numbers


class Executes:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "alone.pth"])
def test_a_pickle_that_would_execute_does_not(formats, tmp_path, name, capsys):
    marker = tmp_path / "executed"
    folder = copy_of(formats["meta"], tmp_path / "meta")
    torch.save({"norm.weight": Executes(marker)}, folder / name)
    pickle.loads(pickle.dumps(Executes(marker)))  # it would
    assert marker.is_dir()
    marker.rmdir()
    if name == "alone.pth":
        with pytest.raises(ValueError, match="nothing of it was executed"):
            run_tool_here(folder / name, "--norms", "--hash", "--check")
    else:
        assert run_tool_here(folder, "--norms", "--hash", "--check") == 1
        said = capsys.readouterr().out
        assert "nothing of it was executed" in said and said.count("problem: consolidated.00.pth") >= 1
    assert not marker.exists()


def test_a_zip_that_escapes(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/../../escaped", b"x")
    with pytest.raises(ValueError, match="outside the folder"):
        inspect(tmp_path / "x.pth")
    assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["x"].update(shape=[4, 1 << 40]), "lies about its size"),
        (lambda e: e["x"].update(shape=[-4, -4]), "sensible whole numbers"),
        (lambda e: e["x"].update(dtype="OBJECT"), "unknown type 'OBJECT'"),
        (lambda e: e["x"].update(data_offsets=[1 << 39, (1 << 39) + 64]), "truncated"),
        (lambda e: e["y"].update(data_offsets=[32, 96]), "overlap"),
        (lambda e: e["x"].pop("shape"), "entries are no tensors"),
    ],
)
def test_headers_that_lie(tmp_path, change, said):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4, 4), "y": torch.ones(4, 4)}, path)
    entries, data = header_of(path)
    change(entries)
    write_header(path, entries, data)
    report, _ = measured(path)
    assert any(said in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "a header of"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "truncated"),
        ((4).to_bytes(8, "little") + b"[[[[", "no JSON"),
    ],
)
def test_files_that_are_none(tmp_path, data, said):
    (tmp_path / "x.safetensors").write_bytes(data)
    assert said in inspect(tmp_path / "x.safetensors").problems[0]


def test_the_same_dictionary_in_ever_so_many_places(tmp_path, monkeypatch):
    """Which a pickle says in a few bytes; without a value in it nothing would ever be counted."""
    monkeypatch.setattr(raw_torch, "MOST_VALUES", 1000)
    made = {}
    for _ in range(6):
        made = dict.fromkeys(range(10), made)
    torch.save(made, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="more than 1,000 values"):
        inspect(tmp_path / "x.pth")
    torch.save({"x" * 1001: {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a name of 1,003 characters"):
        inspect(tmp_path / "x.pth")


def test_a_colon_in_the_name_of_a_tensor_of_metas(tmp_path):
    torch.save({"a:b": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "consolidated.pth")
    assert torch.equal(inspect(tmp_path).stored.read("a:b"), torch.ones(3))


def test_a_table_without_rows(formats, tmp_path):
    folder = copy_of(formats["hf"], tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:0]
    save_file(tensors, folder / "model.safetensors")
    report, found = measured(folder)
    assert any("head (is [0, " in problem for problem in report.problems)
    assert "embedding" in found.numbers and "head" not in found.numbers


def test_names_that_leave_the_folder_are_not_opened(formats, tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"secret": torch.ones(3)}, tmp_path / "secret.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    index = {"weight_map": {"secret": "../secret.safetensors", "also": str(tmp_path / "secret.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = inspect(folder)
    assert not report.stored.infos and any("outside the folder" in problem for problem in report.problems)


def test_an_index_of_ours_that_lies(formats, tmp_path):
    folder = copy_of(formats["megatron"], tmp_path / "run")
    path = checkpoint_in(folder) / "index.json"
    index = json.loads(path.read_text())
    index["decoder.layers.mlp.linear_fc2.weight"]["shape"][0] = 1 << 35
    index["decoder.layers.mlp.linear_fc2.weight"]["parts"][0][3][0] = 1 << 35
    index["output_layer.weight"]["parts"][0][1] = "embedding.word_embeddings.weight@0,0"
    path.write_text(json.dumps(index))
    report, found = measured(folder)
    assert any("output_layer.weight" in problem and "cannot be" in problem for problem in report.problems)
    assert "embedding" in found.numbers and not {"layers.0.down", "head"} & found.numbers.keys()


def test_a_configuration_that_extends_another_is_not_followed(formats, tmp_path):
    folder = copy_of(formats["megatron"], tmp_path / "run")
    (checkpoint_in(folder) / "config.yaml").write_text("extends: chameleon_7b\n")
    report = inspect(folder)
    assert any("not followed" in problem for problem in report.problems) and report.model is None
    assert report.stored.infos


@pytest.mark.parametrize(
    "settings",
    [
        '{"model_type": "chameleon", "num_hidden_layers": 1000000000}',
        '{"model_type": "chameleon", "num_hidden_layers": 1001}',
        *("[1]", "{", "\x00"),
    ],
)
def test_settings_that_make_no_sense(formats, tmp_path, settings, capsys):
    folder = copy_of(formats["hf"], tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    text = json.dumps(values | json.loads(settings)) if settings.startswith('{"') else settings
    (folder / "config.json").write_text(text)
    status, found = as_json(capsys, folder)
    assert status == 1 and found["tensors"] and "config.json" in " ".join(found["problems"])


def test_a_name_cannot_write_to_the_terminal(tmp_path, capsys):
    save_file({"\x1b[31mred\x07": torch.ones(2)}, tmp_path / "x.safetensors")
    run_tool_here(tmp_path / "x.safetensors", "--tensors", "--norms", "--statistics")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "\\x1b[31mred" in said


def test_a_name_is_no_markup(tmp_path, capsys):
    names = ["layers.0.[/red]x", "[bold]y[/x]", ":smile:"]
    for number in (1, 2):
        save_file({name: torch.full((2,), float(number)) for name in names}, tmp_path / f"{number}.safetensors")
    run_tool_here(tmp_path / "1.safetensors", "--tensors", "--norms", "--statistics")
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    run_tool_here("--diff", tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_a_file_of_another_size_is_told_without_check(formats, tmp_path):
    folder = copy_of(formats["megatron"], tmp_path / "run")
    with (checkpoint_in(folder) / "progress.json").open("a") as file:
        file.write(" ")
    (problem,) = inspect(folder).problems
    assert problem.startswith("progress.json: ") and "the manifest says" in problem
