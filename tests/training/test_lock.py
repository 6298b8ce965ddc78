import pytest

from megachameleon.training.lock import run_lock


def test_a_folder_in_use_is_refused_and_freed_afterwards(tmp_path):
    with run_lock(tmp_path / "run"):  # noqa: SIM117
        with pytest.raises(ValueError, match="is in use by process"), run_lock(tmp_path / "run"):
            pass
    with run_lock(tmp_path / "run"):
        pass
