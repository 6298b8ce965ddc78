import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megachameleon.data.documents import DocumentOptions
from megachameleon.data.plan import (
    ORDINAL_BITS,
    PlannedInput,
    duplicates_hash,
    load_plan,
    make_units,
    planned_units,
    save_plan,
)

SHARED = {
    "root": "s3://bucket/raw",
    "tokenizer": "/t",
    "tokenizer_fingerprint": "t" * 16,
    "image_tokenizer": None,
    "image_tokenizer_fingerprint": None,
    "options": DocumentOptions(languages=("en",)),
    "allow_damaged_archives": False,
    "drop_duplicates": True,
}


def inputs(count: int, **changes) -> list[PlannedInput]:
    values = {"bytes": 10, "sha256": "0" * 64, "text_bytes": 10, "num_pictures": 0} | changes
    return [PlannedInput(name=f"part/{i:06d}.jsonl", **values) for i in range(count)]


def test_one_unit_of_many_is_read_alone(tmp_path, monkeypatch):
    units = make_units(inputs(10_000))
    save_plan(tmp_path, SHARED, units, np.empty(0, np.int64))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    read: list[int] = []
    open_file = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how, **more: _Counting(open_file(self, *how, **more), read.append))
    plan = load_plan(tmp_path)
    unit = plan.unit(7_654)
    assert unit == units[7_654]
    assert plan.input_path(unit.inputs[0]) == "s3://bucket/raw/part/007654.jsonl"
    assert sum(read) < 3000 < total / 500
    monkeypatch.undo()
    assert planned_units(tmp_path)[-1] == "09999-009999"
    assert plan == load_plan(tmp_path) and list(plan.units()) == list(units)


class _Counting:
    def __init__(self, file, count):
        self._file, self._count = file, count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def seek(self, position):
        return self._file.seek(position)

    def read(self, size=-1):
        content = self._file.read(size)
        self._count(len(content))
        return content


def test_names_sort_in_the_order_of_the_inputs_however_many():
    names = [unit.name for unit in make_units(inputs(100_001))]
    assert names == sorted(names) and names[100_000] == "100000-100000" and names[0] == "000000-000000"


def test_units_of_bytes_hold_neighbours():
    groups = make_units(inputs(10), unit_bytes=25)
    assert [len(unit.inputs) for unit in groups] == [3, 3, 3, 1]
    assert [item for unit in groups for item in unit.inputs] == inputs(10)
    assert [len(unit.inputs) for unit in make_units(inputs(3), unit_bytes=1)] == [1, 1, 1]


def test_duplicates_belong_to_their_inputs(tmp_path):
    items = [replace(item, num_duplicates=count) for item, count in zip(inputs(3), (2, 0, 1), strict=True)]
    first, second = make_units(items, count=2)
    rows = np.array([1, 2 << ORDINAL_BITS | 1, 7], np.int64)
    first = replace(first, duplicates_hash=duplicates_hash(rows[:2]))
    second = replace(second, first_duplicate=2, duplicates_hash=duplicates_hash(rows[2:]))
    plan = save_plan(tmp_path, SHARED, (first, second), rows)
    assert [len(unit.inputs) for unit in plan.units()] == [2, 1]
    assert [part.tolist() for part in plan.duplicates(plan.unit(0))] == [[1, 2 << ORDINAL_BITS | 1], []]
    assert [part.tolist() for part in plan.duplicates(plan.unit(1))] == [[7]]


def test_another_plan_is_refused_and_replaced_without_rest(tmp_path):
    none = np.empty(0, np.int64)
    save_plan(tmp_path, SHARED, make_units(inputs(3)), none)
    save_plan(tmp_path, SHARED, make_units(inputs(3)), none)
    names = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "plan-of-mine.txt").touch()
    with pytest.raises(ValueError, match="another plan is there"):
        save_plan(tmp_path, SHARED, make_units(inputs(3, sha256="1" * 64)), none)
    save_plan(tmp_path, SHARED, make_units(inputs(3, sha256="1" * 64)), none, replace=True)
    after = {path.name for path in tmp_path.iterdir()}
    assert after & names == {"plan.json"} and len(after) == 5 and "plan-of-mine.txt" in after


@pytest.mark.parametrize("suffix", [".index.npy", ".units.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "cut", "garbage"])
def test_a_damaged_list_of_units_says_to_plan_again(tmp_path, suffix, damage):
    save_plan(tmp_path, SHARED, make_units(inputs(3)), np.empty(0, np.int64))
    (path,) = tmp_path.glob(f"*{suffix}")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else os.urandom(path.stat().st_size))
    with pytest.raises(ValueError, match=r"plan\.json: damaged plan .*plan --replace"):
        load_plan(tmp_path).unit(2)
