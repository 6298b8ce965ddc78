"""Reading any boxes of stored tensors: complete, a file at a time, with errors that name what is wrong."""

import pytest
import torch
from safetensors.torch import save_file

from megachameleon.checkpoint import tensors
from megachameleon.checkpoint.tensors import (
    StoredTensor,
    index_from_json,
    index_of,
    index_to_json,
    merge_indexes,
    read_tensors,
)

SHAPE = (6, 10)


def stored(key, values, offset):
    return StoredTensor(key=key, global_shape=SHAPE, offset=offset, data=values)


@pytest.fixture
def checkpoint(tmp_path):
    """Two tensors, each in quarters over two files: the left ones in `a`, the right ones in `b`."""
    whole = {"w": torch.arange(60.0).view(SHAPE), "m": -torch.arange(60.0).view(SHAPE)}
    indexes = []
    for name, columns in (("a", slice(0, 4)), ("b", slice(4, 10))):
        parts = [
            stored(key, whole[key][rows, columns].contiguous(), (rows.start, columns.start))
            for key in whole
            for rows in (slice(0, 3), slice(3, 6))
        ]
        save_file({part.name: part.data for part in parts}, tmp_path / name)
        indexes.append(index_of(parts, name))
    return tmp_path, merge_indexes(indexes), whole


def test_any_box_of_any_tensor_is_read(checkpoint):
    folder, index, whole = checkpoint
    boxes = [("w", (0, 0), (6, 10)), ("m", (2, 3), (2, 3)), ("w", (5, 9), (1, 1)), ("m", (0, 4), (3, 6))]
    wanted = [stored(key, torch.full(shape, torch.nan), offset) for key, offset, shape in boxes]
    read_tensors(folder, index_from_json(index_to_json(index), "index"), wanted)
    for key, (row, column), (rows, columns), item in ((*box, item) for box, item in zip(boxes, wanted, strict=True)):
        assert torch.equal(item.data, whole[key][row : row + rows, column : column + columns])


def test_values_are_rounded_to_the_type_that_is_wanted(checkpoint):
    folder, index, whole = checkpoint
    wanted = stored("w", torch.zeros(SHAPE, dtype=torch.bfloat16), (0, 0))
    read_tensors(folder, index, [wanted])
    assert torch.equal(wanted.data, whole["w"].bfloat16())


def test_views_of_training_memory_are_filled_in_place(checkpoint):
    folder, index, whole = checkpoint
    memory = torch.zeros(100)
    read_tensors(folder, index, [stored("w", memory[7:67].view(SHAPE), (0, 0))])
    assert torch.equal(memory[7:67], whole["w"].flatten()) and memory[:7].sum() == memory[67:].sum() == 0


def test_each_file_is_opened_once_and_one_at_a_time(checkpoint, monkeypatch):
    """However many boxes are wanted, and only the files that hold some of them."""
    folder, index, _ = checkpoint
    opened, now = [], []
    real = tensors.safe_open

    class Counted:
        def __init__(self, path, **options):
            self.path, self.file = path, real(path, **options)

        def __enter__(self):
            opened.append(self.path.name)
            now.append(self.path.name)
            assert len(now) == 1
            return self.file.__enter__()

        def __exit__(self, *error):
            now.pop()
            return self.file.__exit__(*error)

    monkeypatch.setattr(tensors, "safe_open", Counted)
    wanted = [stored(key, torch.empty(1, 10), (row, 0)) for row in range(6) for key in ("w", "m")]
    read_tensors(folder, index, wanted)
    assert sorted(opened) == ["a", "b"]
    read_tensors(folder, index, [stored("w", torch.empty(6, 4), (0, 0))])
    assert sorted(opened) == ["a", "a", "b"]


def test_never_more_than_one_overlap_is_in_memory(checkpoint, monkeypatch):
    folder, index, _ = checkpoint
    sizes = []
    real = tensors.safe_open

    class Slices:
        def __init__(self, path, **options):
            self.file = real(path, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Sized:
                def __getitem__(self, place):
                    values = part[place]
                    sizes.append(values.numel())
                    return values

            return Sized()

    monkeypatch.setattr(tensors, "safe_open", Slices)
    read_tensors(folder, index, [stored("w", torch.empty(2, 2), (2, 3))])
    assert sizes == [1, 1, 1, 1]


def test_what_is_missing_or_other_is_named(checkpoint):
    folder, index, _ = checkpoint
    with pytest.raises(ValueError, match="has no tensor v; it belongs to another model"):
        read_tensors(folder, index, [stored("v", torch.empty(SHAPE), (0, 0))])
    wider = StoredTensor(key="w", global_shape=(6, 12), offset=(0, 0), data=torch.empty(6, 12))
    with pytest.raises(ValueError, match=r"tensor w has shape \[6, 10\], the model needs \[6, 12\]"):
        read_tensors(folder, index, [wider])
    values = index_to_json(index)
    del values["m"]["parts"][1]
    target = torch.full(SHAPE, 5.0)
    with pytest.raises(ValueError, match=r"tensor m is incomplete \(48 of 60 values.*delete it"):
        read_tensors(folder, index_from_json(values, "index"), [stored("m", target, (0, 0))])
    assert (target == 5).all(), "something was filled before all was known to be there"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no tensors")])
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(checkpoint, damage):
    folder, index, _ = checkpoint
    damage(folder / "b")
    with pytest.raises(ValueError, match=r"/b: cannot be read .*; the checkpoint is damaged: delete it to go on"):
        read_tensors(folder, index, [stored("w", torch.empty(SHAPE), (0, 0))])


def test_a_part_that_the_file_lacks_is_named(checkpoint):
    folder, index, _ = checkpoint
    save_file({"other": torch.zeros(1)}, folder / "a")
    with pytest.raises(ValueError, match=r"/a: cannot be read .*w@0,0"):
        read_tensors(folder, index, [stored("w", torch.empty(SHAPE), (0, 0))])
