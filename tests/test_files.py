"""Files that are read whole."""

import os

import pytest

from megachameleon.files import MOST_JSON_BYTES, read_json


def test_json_is_read_from_files_of_a_sensible_size_only(tmp_path):
    (tmp_path / "good.json").write_text("[1]")
    assert read_json(tmp_path / "good.json") == [1]
    os.mkfifo(tmp_path / "pipe.json")  # would be waited for
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    for name in ("pipe.json", "sparse.json"):
        with pytest.raises(ValueError, match=rf"{name}: not valid JSON \(no file of at most 1,073,741,824 bytes\)"):
            read_json(tmp_path / name)
