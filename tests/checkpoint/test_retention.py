"""Which checkpoints stay."""

import shutil

import pytest
from small_saves import save_all, stored_value

from megachameleon.checkpoint.folder import complete_checkpoints
from megachameleon.checkpoint.retention import Retention, delete_after, delete_old, set_aside
from megachameleon.config import CheckpointConfig


def names(root):
    return sorted(path.name for path in root.iterdir())


def saved(root, steps, **settings):
    for step in steps:
        done = save_all(root, step, f"host-1-ab-{step}", **settings)
    return done


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [9]), (2, 0, [8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9]), (99, 0, list(range(1, 10)))],
)
def test_the_last_and_every_so_many_stay(tmp_path, keep_last, keep_every, kept):
    saved(tmp_path, range(1, 10), keep_last=keep_last, keep_every=keep_every)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in kept)]
    assert (tmp_path / "latest").read_text() == "step_00000009\n"


def test_nothing_is_deleted_before_the_new_one_is_there(tmp_path, monkeypatch):
    import megachameleon.checkpoint.saving as saving

    saved(tmp_path, [1])
    seen = []
    delete = saving.delete_old
    monkeypatch.setattr(saving, "delete_old", lambda *a: (seen.append(names(tmp_path)), delete(*a))[1])
    saved(tmp_path, [2], keep_last=1)
    assert seen == [["latest", "step_00000001", "step_00000002"]]
    assert names(tmp_path) == ["latest", "step_00000002"] and stored_value(tmp_path / "step_00000002") == 2


def test_the_newest_stays_whatever_the_policy(tmp_path):
    saved(tmp_path, [1, 2])
    delete_old(tmp_path, Retention(keep_last=0), "host-1-ab-9")
    assert names(tmp_path) == ["latest", "step_00000002"]


def test_damaged_ones_do_not_count_and_are_not_deleted(tmp_path):
    saved(tmp_path, [1, 2, 3])
    for _ in range(2):
        set_aside(tmp_path / "step_00000003")
        saved(tmp_path, [3], keep_last=2)
    assert names(tmp_path)[1:] == ["step_00000002", "step_00000003", *(f"step_00000003.damaged{n}" for n in ("", "-2"))]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_what_cannot_be_deleted_is_told_and_stops_nothing(tmp_path, monkeypatch):
    from pathlib import Path

    saved(tmp_path, [1, 2])
    rename = Path.rename

    def refuse(path, target):
        if path.name == "step_00000001":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    (complaint,) = saved(tmp_path, [3], keep_last=1).complaints
    assert complaint.endswith("step_00000001: cannot be deleted (Permission denied); delete it by hand")
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_a_run_that_was_rolled_back_forgets_what_came_after(tmp_path):
    saved(tmp_path, [1, 2, 3], keep_last=3)
    assert [path.name for path in delete_after(tmp_path, 1, "host-1-ab-9")] == ["step_00000003", "step_00000002"]
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_deletion_that_others_hold_open_is_finished_later(tmp_path, monkeypatch):
    from megachameleon.checkpoint.retention import recover

    saved(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as NFS leaves .nfs files
        saved(tmp_path, [2], keep_last=1)
    assert ".step_00000001.host-1-ab-2.deleting" in names(tmp_path)
    recover(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000002"] and any((tmp_path / "step_00000002").iterdir())


def test_settings_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"checkpoint\.keep_every: 25 must be a multiple of checkpoint\.every=10, or 0"
    ):
        CheckpointConfig(every=10, keep_every=25).validate()
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last: 0 must be at least 1"):
        CheckpointConfig(keep_last=0).validate()
    CheckpointConfig(every=10, keep_every=20).validate()
