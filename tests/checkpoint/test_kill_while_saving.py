"""Signal 9 before any operation on a file leaves a checkpoint that is whole: the one before or the new one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_saves import RANKS, save_all, small_save, stored_value

from megachameleon.checkpoint.folder import MANIFEST_FILE
from megachameleon.checkpoint.retention import hidden_folder, new_owner, recover

OLD, NEW = ("step_00000002", "2.0"), ("step_00000003", "3.0")
EXPECTED = {
    "save": {OLD, NEW},
    "again": {OLD, ("step_00000002", "22.0")},
    "roll back": {OLD, ("step_00000001", "1.0")},
    "set aside": {OLD, ("step_00000001", "1.0")},
}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_every_moment_leaves_a_whole_checkpoint(scenario):
    program = Path(__file__).parent / "small_saves.py"
    result = subprocess.run(
        [sys.executable, program, scenario], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    found = [tuple(line.split()[1:]) for line in result.stdout.splitlines()]
    assert set(found) == EXPECTED[scenario]  # both were met: the kills began early enough and went on long enough
    assert len(found) > {"save": 50, "again": 50, "roll back": 6, "set aside": 2}[scenario]
    assert found == sorted(found, key=lambda item: item != found[0])  # once it is there, it stays


def test_what_is_visible_is_durable(tmp_path, monkeypatch):
    """The order of operations: all files and their folder reach the disk, then the name, then the pointer."""
    done = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink()))), sync(fd))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (done.append(("rename", a.name, b.name)), rename(a, b))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(("replace", str(a), str(b))), replace(a, b))[1])
    save_all(tmp_path, 3, "host-1-ab-1")
    hidden = ".step_00000003.host-1-ab-1.tmp"
    visible = done.index(("rename", hidden, "step_00000003"))
    before, after = done[:visible], done[visible + 1 :]
    for path in (tmp_path / "step_00000003").iterdir():
        written = str(tmp_path / hidden / path.name)
        last = max(i for i, item in enumerate(before) if written in item or item[-1] == written)
        if path.suffix == ".safetensors":
            assert before[last] == ("sync", written)
        else:  # written under a temporary name: synchronized, then renamed
            assert before[last][0] == "replace" and ("sync", before[last][1]) in before[:last]
    manifest = str(tmp_path / hidden / MANIFEST_FILE)
    assert before[-1] == ("sync", str(tmp_path / hidden)) and before[-2][-1] == manifest
    assert after[0] == ("sync", str(tmp_path))
    assert after[-2][-1] == str(tmp_path / "latest")


def test_a_living_run_is_left_alone(tmp_path):
    save_all(tmp_path, 1, f"{new_owner()}-1")
    living = new_owner().replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    for state in ("tmp", "deleting"):
        hidden_folder(tmp_path, 2, f"{living}-1", state).mkdir()
        hidden_folder(tmp_path, 3, "elsewhere-1-ab-1", state).mkdir()
    recover(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f".step_00000002.{living}-1.deleting", f".step_00000002.{living}-1.tmp", "latest", "step_00000001"]


def test_a_complete_one_without_its_name_gets_it(tmp_path):
    save_all(tmp_path, 1, f"{new_owner()}-1")
    (tmp_path / "step_00000001").rename(hidden_folder(tmp_path, 1, "elsewhere-1-ab-1", "tmp"))
    assert ["put in place" in line for line in recover(tmp_path)] == [True]
    assert stored_value(tmp_path / "step_00000001") == 1


def test_the_record_of_a_dead_attempt_is_not_taken_for_this_one(tmp_path):
    """Rank 1 of an earlier run had written its share of the same step; this run's rank 1 fails."""
    from megachameleon.checkpoint.saving import SaveError, write_share

    write_share(small_save(tmp_path, 3, 1, "dead-1-ab-1", value=99))
    (tmp_path / ".step_00000003.live-2-cd-1.tmp").mkdir()
    (tmp_path / ".step_00000003.live-2-cd-1.tmp/failed_00001.json").write_text('{"reason": "rank 1 has no room"}')
    with pytest.raises(SaveError, match="rank 1 has no room"):
        save_all_but_one(tmp_path)
    assert RANKS == 2 and not (tmp_path / "step_00000003").exists()


def save_all_but_one(root):
    from megachameleon.checkpoint.saving import write_checkpoint

    write_checkpoint(small_save(root, 3, 0, "live-2-cd-1"))
