"""tools/inspect_checkpoint.py as a user calls it."""

import os
import pty
import re
import subprocess
import sys

import pytest
from inspecting import TOOL, as_json, run_tool_here
from PIL import Image
from rich.console import Console

from megachameleon.checkpoint.inspection.norms import sort_norms, sparkline
from megachameleon.checkpoint.inspection.terminal import print_report


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def call(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def test_help_has_examples_and_statuses():
    said = call("--help").stdout
    assert "--diff downloads/meta/30b" in said and "Exit status: 0 whole, or equal; 1 damaged" in said


def test_piped_output_has_neither_colours_nor_a_bar(formats):
    result = call(formats["meta"], "--norms", "--hash", "--check")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    for text in ("Chameleon in Meta's layout, 4 files", "norm by kind", "content ", "compared 6 as it should be", "█"):
        assert text in result.stdout


def test_a_terminal_of_80_columns_has_colours_and_a_bar(formats):
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    with subprocess.Popen(command(formats["hf"], "--norms"), stdout=writer, stderr=writer, env=environment) as process:
        os.close(writer)
        said = b""
        try:
            while piece := os.read(reader, 4096):
                said += piece
        except OSError:  # how Linux says that the other side has closed
            pass
    os.close(reader)
    assert process.returncode == 0 and b"\x1b[1m" in said and b"reading tensors (MB)" in said
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in said.decode().splitlines()]
    assert max(map(len, shown)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PATH: give one checkpoint, or two with --diff A B"),
        (["x", "--picture", "x.jpg"], "must end in .svg or .png"),
        (["--diff", "a", "b", "--norms"], "--norms: says nothing about --diff"),
        (["/nowhere"], "/nowhere: no such file or folder"),
        (["x", "--tolerance", "0.1"], "--tolerance: is for --diff"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_tool_here(*arguments)


def test_one_line_and_status_2_for_no_checkpoint(tmp_path):
    result = call(tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}: no checkpoint") and result.stderr.count("\n") == 1


def test_status_1_for_a_damaged_one(formats, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes((formats["hf"] / "model.safetensors").read_bytes()[:-10])
    assert run_tool_here(path) == 1
    assert "problem: x.safetensors: truncated" in capsys.readouterr().out


def test_tensors_are_listed_by_pattern(formats, capsys):
    run_tool_here(formats["megatron"], "--tensors", "layers.1.?")
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines() if line.startswith("layers.1.")]
    assert [line[0] for line in lines] == [f"layers.1.{name}" for name in "qkvo"]
    assert lines[0][1:] == ["256x256", "bfloat16", "tensors_00000.safetensors"]
    with pytest.raises(ValueError, match="fits none of"):
        run_tool_here(formats["megatron"], "--tensors", "nothing")


def test_json_has_everything(formats, capsys, inspected_case):
    status, found = as_json(capsys, formats["megatron"], "--statistics", "--hash", "--check")
    assert status == 0 and len(found["content_hash"]) == 64
    assert found["parameters"]["total"] == inspected_case.model.num_parameters
    assert found["tensors"]["head"]["shape"] == [128, 256]
    assert found["numbers"].keys() == found["tensors"].keys()
    assert set(found["check"].values()) == {"as it should be"}
    assert found["model"]["norm_order"] == "swin" and found["problems"] == []


def test_pictures(formats, tmp_path, capsys):
    run_tool_here(formats["hf"], "--picture", tmp_path / "norms.svg")
    drawn = (tmp_path / "norms.svg").read_text()
    assert drawn.count("<polyline") == 13 and ">attention_norm<" in drawn and "outside layers: embedding" in drawn
    run_tool_here(formats["hf"], "--picture", tmp_path / "norms.png")
    with Image.open(tmp_path / "norms.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("RGB").get_flattened_data())) > 8


def test_nothing_is_lost_at_80_columns(formats):
    from megachameleon.checkpoint.inspection.opening import inspect

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    print_report(inspect(formats["megatron"]), console, {})
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    assert "tensors_00000.safetensors" in said and "key/value heads 8" in said


def test_sparkline():
    assert sparkline([1.0, 2.0, None, 3.0], 10) == "▁▅ █"
    assert sparkline([2.0, 2.0], 10) == "██"
    assert sparkline([1.0, 3.0, 2.0, 2.0], 2) == "██"
    assert sparkline([float("inf"), 1.0], 4) == "!█"
    assert len(sparkline([float(i) for i in range(100)], 30)) <= 30


def test_parts_of_a_tensor_are_one_norm():
    norms = sort_norms({"decoder.layers.mlp.x.weight@2,0,0": 3.0, "decoder.layers.mlp.x.weight@2,8,0": 4.0, "y": 1.0})
    assert norms.by_kind == {"mlp.x": {2: 5.0}} and norms.outside == {"y": 1.0}
