"""What is damaged is named and set aside, and the run goes on from the one before it; never silently from nothing."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cases import build_trainer, run_training
from small_saves import save_all

from megachameleon.checkpoint.folder import (
    DamagedCheckpointError,
    complete_checkpoints,
    parse_manifest,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
)
from megachameleon.parallel.context import parallel_context

NEWEST = "step_00000006"


def resumed_step(config):
    """Step from which a run goes on, what this rank sees of the folder then, and what it has said."""
    said = io.StringIO()
    with parallel_context(config.parallel) as context, contextlib.redirect_stderr(said):
        step = build_trainer(config, context).step
        names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
        return step, names, said.getvalue()


@pytest.fixture(scope="module")
def finished(workers, module_config):
    settings = module_config("training.num_steps=6", "checkpoint.every=3")
    workers.run(2, run_training, settings)
    return settings


@pytest.fixture
def run_copy(finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "copy")
    return replace(finished, output_dir=str(tmp_path / "copy"))


def flip(path, place=-5):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def other_value(path):
    """A digit of the manifest changes; it is JSON still."""
    path.write_text(path.read_text().replace('"consumed_samples": ', '"consumed_samples": 1'))


def of_another_step(path):
    """Sealed, but of files of another step."""
    write_manifest(path.parent, replace(parse_manifest(path.parent), files={"gone.json": {"size": 1, "sha256": ""}}))


DAMAGE = {
    "flipped byte of rank 1": ("tensors_00001.safetensors", flip, "tensors_00001.safetensors: its SHA-256 differs"),
    "truncated": (
        "tensors_00000.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "bytes, the manifest says",
    ),
    "missing": ("index.json", Path.unlink, "index.json: missing, the manifest says"),
    "flipped byte of progress": ("progress.json", flip, "progress.json: its SHA-256 differs"),
    "manifest not JSON": ("manifest.json", lambda path: path.write_text('{"step": '), "not valid JSON"),
    "manifest not text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "manifest.json"),
    "manifest of another kind": ("manifest.json", lambda path: path.write_text("[]"), "not a checkpoint's manifest"),
    "manifest changed": ("manifest.json", other_value, "was changed after it was written"),
    "manifest of other files": ("manifest.json", of_another_step, "gone.json: missing"),
    "no manifest": ("manifest.json", Path.unlink, "no such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_named_and_set_aside(workers, run_copy, kind):
    name, damage, words = DAMAGE[kind]
    root = Path(run_copy.output_dir) / "checkpoints"
    damage(root / NEWEST / name)
    world_size = 2 if "rank 1" in kind else 1
    results = workers.run(world_size, resumed_step, run_copy)
    assert [result[0] for result in results] == [3] * world_size
    assert results[0][1] == ["latest", "step_00000003", "step_00000006.damaged"]
    assert (root / "latest").read_text() == "step_00000003\n"
    lines = [
        line for result in results for line in result[2].splitlines() if "set aside as step_00000006.damaged" in line
    ]
    assert len(lines) == 1 and words in lines[0] and "the checkpoint is damaged" in lines[0]


def test_none_whole_is_an_error_and_stays_one(workers, run_copy):
    for path in (Path(run_copy.output_dir) / "checkpoints").glob("step_*/common.json"):
        path.unlink()
    for _ in range(2):  # the second time all are set aside already
        with pytest.raises(AssertionError, match=r"none is whole .*damaged.*start anew|none is whole .*set aside"):
            workers.run(1, resumed_step, run_copy)


def test_a_folder_from_which_all_were_taken_is_not_a_new_run(workers, run_copy):
    for path in (Path(run_copy.output_dir) / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(AssertionError, match="latest names step_00000006"):
        workers.run(1, resumed_step, run_copy)


def test_another_format_is_refused_and_not_set_aside(workers, run_copy):
    path = Path(run_copy.output_dir) / "checkpoints" / NEWEST / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(AssertionError, match=r"checkpoint format 1, this release reads format 2"):
        workers.run(1, resumed_step, run_copy)
    assert path.is_file()


@pytest.mark.parametrize("pointer", ["step_00000003", "step_00000099", ""])
def test_the_folder_is_right_where_the_pointer_differs(workers, run_copy, pointer):
    root = Path(run_copy.output_dir) / "checkpoints"
    (root / "latest").write_text(pointer)
    step, _, said = workers.run(1, resumed_step, run_copy)[0]
    assert step == 6 and (root / "latest").read_text() == f"{NEWEST}\n"
    assert f"names {pointer or 'nothing'}; going on from {NEWEST}" in said


def test_a_file_system_that_does_not_answer_is_not_damage(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import megachameleon.checkpoint.folder as folder
    from megachameleon.training.checkpointing import examine

    save_all(tmp_path, 3, "host-1-ab-1")

    def stale(path):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(folder, "sha256_of", stale)
    kind, text = examine(tmp_path / "step_00000003", SimpleNamespace(rank=0, world_size=1))
    assert kind == "unusable" and "Stale file handle" in text and "rename step_00000003" in text


def test_reading_for_inference_names_the_damage_and_the_one_before(run_copy):
    run = Path(run_copy.output_dir)
    assert resolve_checkpoint(run).name == NEWEST
    (run / "checkpoints" / NEWEST / "config.yaml").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"config\.yaml: missing.*give .*step_00000003, the one before"):
        resolve_checkpoint(run)
    (run / "checkpoints" / "step_00000003" / "manifest.json").unlink()
    assert complete_checkpoints(run / "checkpoints")[-1].name == NEWEST
    with pytest.raises(DamagedCheckpointError, match="there is no whole one before it"):
        resolve_checkpoint(run)


def test_a_manifest_knows_the_sizes(run_copy):
    checkpoint = Path(run_copy.output_dir) / "checkpoints" / NEWEST
    assert read_manifest(checkpoint).step == 6
    path = checkpoint / "tensors_00000.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DamagedCheckpointError, match=r"tensors_00000\.safetensors: \d+ bytes, the manifest says \d+"):
        read_manifest(checkpoint)
