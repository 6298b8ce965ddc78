"""Saving beside training: what is stored is the moment of the save, errors come out in one line, nothing is left."""

import errno
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import build_trainer, run_training
from safetensors import safe_open
from small_saves import save_all, small_save, stored, stored_value, tensors_of

import megachameleon.checkpoint.saving as saving
from megachameleon.checkpoint.background import Background
from megachameleon.checkpoint.saving import SaveError, write_checkpoint, write_share
from megachameleon.checkpoint.snapshot import HostMemory, available_memory, file_order, live_snapshot, write_snapshot
from megachameleon.files import sha256_of
from megachameleon.parallel.context import parallel_context

ATTEMPT = "host-1-ab-1"


def many_kinds():
    base = torch.arange(24)
    return [
        stored("bytes", base[:3].to(torch.uint8)),
        stored("half", base.to(torch.bfloat16).view(4, 6)),
        stored("empty", torch.empty(0, 5)),
        stored("scalar", torch.tensor(7.5)),
        stored("double", base.double()[1:8]),
        stored("single", base.float().view(2, 3, 4)),
    ]


@pytest.mark.parametrize("copied", [True, False])
def test_the_file_is_safetensors_with_the_stated_hash(tmp_path, copied):
    tensors = many_kinds()
    snapshot = HostMemory(torch.device("cpu")).copy(tensors) if copied else live_snapshot(tensors)
    written = write_snapshot(tmp_path / "t.safetensors", snapshot)
    assert written == {
        "size": (tmp_path / "t.safetensors").stat().st_size,
        "sha256": sha256_of(tmp_path / "t.safetensors"),
    }
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert set(file.keys()) == {item.name for item in tensors}
        for item in tensors:
            got = file.get_tensor(item.name)
            assert got.dtype == item.data.dtype and torch.equal(got, item.data)


def test_a_snapshot_is_one_copy_whose_memory_is_used_again():
    memory = HostMemory(torch.device("cpu"))
    tensors = many_kinds()
    first = memory.copy(tensors)
    assert memory.num_bytes == first.num_bytes == sum(item.data.nbytes for item in tensors)
    place = first.tensors[0].data.data_ptr()
    assert memory.copy(tensors).tensors[0].data.data_ptr() == place
    assert [item.key for item in file_order(tensors)] == [item.key for item in first.tensors]


def test_what_is_stored_is_the_moment_of_the_save(tmp_path, monkeypatch):
    """Training changes its tensors while the writer has not even begun."""
    let_go = threading.Event()
    write = saving.write_snapshot
    monkeypatch.setattr(saving, "write_snapshot", lambda *a: (let_go.wait(10), write(*a))[1])
    live = tensors_of(0, 5)
    save = small_save(tmp_path, 1, 0, ATTEMPT, tensors=live, world_size=1)
    save = replace(save, snapshot=HostMemory(torch.device("cpu")).copy(live))
    writer = Background("test")
    writer.start(lambda: write_checkpoint(save))
    live[0].data.fill_(-1)
    assert writer.busy and writer.results() == []
    let_go.set()
    writer.wait()
    (done,) = writer.results()
    with safe_open(done.path / "tensors_00000.safetensors", framework="pt") as file:
        assert (file.get_tensor("w@0,0") == 5).all()


def test_nothing_is_visible_before_all_ranks_have_written(tmp_path):
    write_share(small_save(tmp_path, 3, 1, "dead-1-ab-1", value=99))  # of an earlier attempt
    writer = Background("test")
    writer.start(lambda: write_checkpoint(small_save(tmp_path, 3, 0, ATTEMPT)))
    time.sleep(0.3)
    assert writer.busy and not (tmp_path / "step_00000003").exists()
    write_share(small_save(tmp_path, 3, 1, ATTEMPT))
    writer.wait()
    assert writer.results()[0].path.name == "step_00000003"
    assert stored_value(tmp_path / "step_00000003") == 3


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used up")])
def test_a_rank_without_room_says_so_and_so_does_the_main_process(tmp_path, monkeypatch, number, words):
    save_all(tmp_path, 1, "host-1-aa-1")

    def no_room(path, snapshot):
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_snapshot", no_room)
        with pytest.raises(SaveError, match=f"rank 1 cannot write tensors_00001.*{words}.*earlier checkpoints"):
            write_checkpoint(small_save(tmp_path, 2, 1, ATTEMPT))
    assert [path.name for path in (tmp_path / f".step_00000002.{ATTEMPT}.tmp").iterdir()] == ["failed_00001.json"]
    with pytest.raises(SaveError, match="rank 1 cannot write"):
        write_checkpoint(small_save(tmp_path, 2, 0, ATTEMPT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


SAVE_UNTIL_FULL = """
import resource, sys
from pathlib import Path
import torch
from small_saves import small_save, stored
from megachameleon.checkpoint.saving import SaveError, write_checkpoint
root = Path(sys.argv[1])
limit = int(sys.argv[2])
write_checkpoint(small_save(root, 1, 0, "a-1-ab-1", world_size=1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
big = [stored("w", torch.zeros(1_000_000))]
try:
    write_checkpoint(small_save(root, 2, 0, "a-1-ab-2", tensors=big, world_size=1))
except SaveError as error:
    print(error)
"""


def save_until_full(root, limit):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SAVE_UNTIL_FULL, root, str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in Path(root).iterdir()) == ["latest", "step_00000001"]
    return result.stdout


def test_a_limit_on_the_size_of_files(tmp_path):
    assert "rank 0 cannot write" in (said := save_until_full(tmp_path / "c", 100_000)) and "may not grow so" in said


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        assert "the disk is full" in save_until_full(folder / "c", 0)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_error_in_the_background_comes_out_once():
    writer = Background("test")
    writer.start(lambda: 1 // 0)
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.results()
    assert writer.results() == []


def test_both_ways_of_saving_store_the_same(workers, config):
    base = ["training.num_steps=3", "checkpoint.every=1"]
    folders = []
    for asynchronous in ("true", "false"):
        settings = config(*base, f"checkpoint.asynchronous={asynchronous}", output=asynchronous)
        workers.run(2, run_training, settings)
        folders.append(Path(settings.output_dir) / "checkpoints")
    for name in ("step_00000002", "step_00000003"):
        files = [{p.name: p.read_bytes() for p in (folder / name).glob("*.safetensors")} for folder in folders]
        assert len(files[0]) == 2 and files[0] == files[1]


@pytest.fixture
def trainer(config):
    settings = config("training.num_steps=4")
    with parallel_context(settings.parallel) as context:
        yield build_trainer(settings, context)


def test_a_save_that_is_due_too_early_waits_and_says_so_once(trainer, monkeypatch, capfd):
    write = saving.write_snapshot
    monkeypatch.setattr(saving, "write_snapshot", lambda *a: (time.sleep(0.3), write(*a))[1])
    for step in (1, 2, 3):
        trainer.checkpointer.save(trainer.state, replace(trainer.progress, step=step))
    trainer.checkpointer.wait()
    assert [path.name for path in trainer.checkpointer.finished()] == [f"step_0000000{step}" for step in (1, 2, 3)]
    said = capfd.readouterr().err
    assert said.count("still being written") == 1 and said.count("training waited") == 3
    assert "copy in host memory" in said


def test_the_writers_error_stops_the_next_call(trainer, monkeypatch):
    def no_room(path, snapshot):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "write_snapshot", no_room)
    trainer.checkpointer.save(trainer.state, trainer.progress)
    with pytest.raises(SaveError, match="the disk is full"):
        trainer.checkpointer.wait()
    trainer.checkpointer.save(trainer.state, trainer.progress)
    with pytest.raises(SaveError, match="the disk is full"):
        trainer.checkpointer.save(trainer.state, trainer.progress)


def test_room_is_asked_for_beforehand(trainer, monkeypatch):
    import megachameleon.training.checkpointing as checkpointing

    assert (available_memory() or 1) > 0
    monkeypatch.setattr(checkpointing, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"GB of memory.*checkpoint\.asynchronous=false"):
        trainer.checkpointer.require_room()
    with pytest.raises(ValueError, match="copies of 8 ranks"):
        trainer.checkpointer.require_room(8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"writing 3 more checkpoints \(3 at a time\) needs"):
        trainer.checkpointer.require_room()
