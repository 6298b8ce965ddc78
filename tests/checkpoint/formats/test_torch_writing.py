"""Torch files written tensor by tensor: torch reads them in every way that it has, and any zip program their sums."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
import torch
from converting import assert_same_tensors

from megachameleon.checkpoint.formats import torch_writing
from megachameleon.checkpoint.formats.plain import Piece
from megachameleon.checkpoint.formats.torch_writing import write_torch_file
from megachameleon.torch_files import read_torch_index

TENSORS = {
    "matrix": torch.randn(70, 50),
    "layers.0.bf16": torch.randn(33).bfloat16(),
    "one value": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "not contiguous": torch.randn(8, 4).T,
}


def written(path, tensors):
    pieces = [Piece(name=name, shape=tuple(t.shape), dtype=t.dtype, cuts=()) for name, t in tensors.items()]
    return write_torch_file(path, pieces, iter(tensors.values()))


@pytest.fixture(params=["small", "with fields of 64 bits"])
def path(request, tmp_path, monkeypatch):
    if request.param != "small":
        monkeypatch.setattr(torch_writing, "LARGE", 0)
    written(tmp_path / "some.pth", TENSORS)
    return tmp_path / "some.pth"


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {}])
def test_torch_reads_it(path, options):
    assert_same_tensors(torch.load(path, **options), TENSORS)


def test_storages_begin_where_torchs_would(path):
    reader = torch._C.PyTorchFileReader(str(path))
    offsets = {name: reader.get_record_offset(name) for name in reader.get_all_records()}
    assert len(offsets) == 3 + len(TENSORS) and not any(offset % 64 for offset in offsets.values())
    for number, (name, found) in enumerate(read_torch_index(path).items()):
        assert found.start == offsets[f"data/{number}"] or not TENSORS[name].numel()


def test_checksums_are_right(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["matrix"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "archive/data/0"


def test_digests_are_those_of_the_file(tmp_path):
    digests = written(tmp_path / "some.pth", TENSORS)
    data = (tmp_path / "some.pth").read_bytes()
    assert digests == {"md5": hashlib.md5(data).hexdigest()}


def test_equal_tensors_make_equal_bytes(tmp_path):
    """In another process too, whose hashes of names differ."""
    torch.save(TENSORS, tmp_path / "tensors.pt")
    code = (
        f"import sys, torch, pathlib; sys.path[:0] = {sys.path!r}\nfrom test_torch_writing import written\n"
        f"root = pathlib.Path({str(tmp_path)!r})\nwritten(root / 'other.pth', torch.load(root / 'tensors.pt'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    written(tmp_path / "some.pth", TENSORS)
    assert (tmp_path / "some.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


def test_a_value_is_held_no_longer_than_it_is_written(tmp_path):
    """One tensor at a time: the next is made when nothing of the last one is left."""
    import weakref

    alive = []

    def tensors():
        for _ in range(4):
            assert not any(reference() is not None for reference in alive)
            tensor = torch.zeros(1000)
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    pieces = [Piece(name=str(i), shape=(1000,), dtype=torch.float32, cuts=()) for i in range(4)]
    write_torch_file(tmp_path / "some.pth", pieces, tensors())
