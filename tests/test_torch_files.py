"""Files of torch.save, honest ones and others: read without executing, and refused in one line where they lie."""

import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from megachameleon import torch_files
from megachameleon.torch_files import TorchTensor, read_part, read_torch_index

BASE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
HONEST = {
    "contiguous": BASE,
    "bf16": BASE.bfloat16(),
    "transposed": BASE.T,
    "rows of a shared storage": BASE[2:5],
    "columns of a shared storage": BASE[:, 2:5],
    "every other": BASE[::2, 1::3],
    "one value": BASE.sum(),
    "empty": torch.empty(0, 4),
    "unit axis": BASE[:, :1],
    "integers": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(BASE.double()),
    "expanded by one": BASE.view(1, 6, 8).expand(1, 6, 8),
}


def everything(tensor):
    return tuple(slice(0, length) for length in tensor.shape)


def read(path, tensor, part=None, dtype=None):
    part = part or everything(tensor)
    out = torch.empty([s.stop - s.start for s in part], dtype=dtype or tensor.dtype)
    read_part(path, tensor, part, out)
    return out


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_was_saved_is_read(tmp_path, protocol):
    path = tmp_path / "some.pth"
    module = torch.nn.Linear(2, 3)
    plain = {"epoch": 3, "rate": 0.5, "nothing": None, "names": ["a", ("b", 70_000, -(2**40))], "yes": True}
    torch.save({**HONEST, **plain, "state": module.state_dict()}, path, pickle_protocol=protocol)
    found = read_torch_index(path)
    assert found.keys() == {*HONEST, *plain, "state"}
    assert {name: found[name] for name in plain} == plain
    for name, tensor in HONEST.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert torch.equal(read(path, found[name]), tensor), name
    assert torch.equal(read(path, found["state"]["weight"]), module.weight)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", ["contiguous", "transposed", "columns of a shared storage", "every other"])
def test_parts(tmp_path, name, block, monkeypatch):
    monkeypatch.setattr(torch_files, "BLOCK", block)
    path, tensor = tmp_path / "some.pth", HONEST[name]
    torch.save({name: tensor}, path)
    found = read_torch_index(path)[name]
    rows, columns = tensor.shape
    for part in [(slice(1, 2), slice(0, columns)), (slice(0, rows), slice(1, 2)), (slice(1, rows), slice(0, 2))]:
        assert torch.equal(read(path, found, part), tensor[part])
        assert torch.equal(read(path, found, part, torch.bfloat16), tensor[part].bfloat16())
        spread = torch.zeros(2 * rows, columns)[::2][part]  # memory with holes
        read_part(path, found, part, spread)
        assert torch.equal(spread, tensor[part])


class Harmful:
    """Executed by an unpickler that knows no better."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed(tmp_path, protocol):
    path, mark = tmp_path / "some.pth", tmp_path / "executed"
    torch.save({"weight": BASE, "x": Harmful(mark)}, path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=rf"{path}: .*nothing (of it )?was\s+executed"):
        read_torch_index(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # so it would have been
    assert mark.exists()


class Storage:
    """Stands for one in a pickle that is made by hand."""

    def __init__(self, key="0", values=4, kind=torch.FloatStorage):
        self.id = ("storage", kind, key, "cpu", values)


class Made:
    """A tensor as a pickle describes it, whatever the storage holds."""

    def __init__(self, shape=(4,), stride=(1,), offset=0, storage=None):
        self.arguments = (storage or Storage(), offset, shape, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class OrderedDictOf:
    """Made with its keys at once, which none of torch's is."""

    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        return OrderedDict, ([(self.key, 1)],)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def pickled(value):
    target = io.BytesIO()
    Pickler(target, protocol=2).dump(value)
    return target.getvalue()


def laughs():
    """A tuple of two that are one, of two that are one, and so on: 2^100 of them to hash or to print."""
    made = ("x",)
    for _ in range(100):
        made = (made, made)
    return made


@pytest.mark.parametrize(
    "made",
    [
        Made(shape=laughs()),
        Made(stride=(laughs(),)),
        Made(storage=Storage(key=laughs())),
        Made(storage=Storage(values=laughs())),
        OrderedDictOf(laughs()),
    ],
)
def test_a_billion_laughs(tmp_path, made):
    path = put(tmp_path / "made.pth", pickled({"w": made}))
    with pytest.raises(ValueError, match=r"no whole numbers|as torch never does|cut off, or damaged") as caught:
        read_torch_index(path)
    assert len(str(caught.value)) < 500


def put(path, pickle_bytes, *more, storage=bytes(16), **options):
    """A zip as torch writes it, with more entries or other ones."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes, **options)
        archive.writestr("archive/data/0", storage)
        for name, data in more:
            archive.writestr(name, data)
    return path


def test_a_zip_made_by_hand_is_read(tmp_path):
    """So what follows is refused for what it changes alone."""
    path = put(tmp_path / "made.pth", pickled({"w": Made()}), ("archive/byteorder", "little"))
    assert torch.equal(read(path, read_torch_index(path)["w"]), torch.zeros(4))


@pytest.mark.parametrize(
    "made",
    [
        Made(shape=(5,)),
        Made(offset=1),
        Made(shape=(2, 2), stride=(3, 1)),
        Made(shape=(2**40,), stride=(0,)),  # 4 TB of one value
        Made(shape=(3, 2), stride=(0, 1)),
        Made(shape=(-1,)),
        Made(shape=(2,), stride=(-1,), offset=1),
        Made(shape=(2, 2), stride=(1,)),
        Made(shape=(2.0,)),
        Made(shape=(1,) * 40, stride=(1,) * 40),
        Made(shape=(1, 4), stride=(2**70, 1)),
        Made(shape=(0, 2**40, 2**40), stride=(1, 1, 1)),
    ],
)
def test_tensors_that_lie_about_their_size(tmp_path, made):
    path = put(tmp_path / "made.pth", pickled({"w": made}))
    with pytest.raises(ValueError, match=rf"{path}: a tensor .*shape.* (does not fit into|cannot be)"):
        read_torch_index(path)


@pytest.mark.parametrize(
    "storage", [Storage(values=2**40), Storage(values=3), Storage(kind=torch.HalfStorage), Storage(key="../0")]
)
def test_storages_that_lie_about_their_size(tmp_path, storage):
    path = put(tmp_path / "made.pth", pickled({"w": Made(shape=(1,), storage=storage)}))
    with pytest.raises(ValueError, match=rf"{path}: data.pkl says that storage .* has \d+ values"):
        read_torch_index(path)


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        ([("../evil", "x")], {}, "entry '../evil' outside the folder"),
        ([("archive/../../evil", "x")], {}, r"entry 'archive/../../evil' outside the folder"),
        ([("/etc/evil", "x")], {}, "entry '/etc/evil' outside the folder"),
        ([("archive/data/0", "x")], {}, "two entries 'archive/data/0'"),
        ([], {"compress_type": zipfile.ZIP_DEFLATED}, "'archive/data.pkl' is compressed or encrypted"),
        ([("archive/byteorder", "big")], {}, "big-endian"),
        ([("archive/constants.pkl", "x")], {"pickle": b"c__torch__\nNet\n."}, "an object of __torch__.Net"),
        ([], {"pickle": b""}, "has no data.pkl"),
        ([], {"pickle": b"\x80\x02."}, "cut off, or damaged"),
        ([], {"pickle": b"\x80\x02}"}, "cut off, or damaged"),
        ([], {"pickle": b"\x80\x02q\xff."}, "cut off, or damaged"),
        ([], {"pickle": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."}, "an object of os.system"),
        ([], {"pickle": b"\x80\x02}))N\x86Ns."}, "a key of type tuple"),
        ([], {"pickle": b"\x80\x02}\x8a\x08" + bytes(7) + b"\x01Ns."}, "a key of 57 bits"),  # its hash may be another's
        ([], {"pickle": b"\x80\x02ctorch\nSize\n](" + b"N" * 17 + b"e\x85R."}, "of a tensor with 17 axes"),
        ([], {"pickle": b"\x80\x02ccollections\nOrderedDict\n(" + b"N" * 17 + b"tR."}, "a call with 17 arguments"),
        ([], {"pickle": b"\x80\x02(lp0\n."}, "the instruction LIST"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_and_pickles_that_are_not_torchs(tmp_path, more, options, said):
    made = options.pop("pickle", None) if "pickle" in options else pickled({"w": Made()})
    path = put(tmp_path / "made.pth", made, *more, **options)
    with pytest.raises(ValueError, match=said) as caught:
        read_torch_index(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_pickle_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MOST_PICKLE_BYTES", 1000)
    path = put(tmp_path / "made.pth", pickled({"w": "x" * 1000}))
    with pytest.raises(ValueError, match=r"data.pkl has 1,0.. bytes, more than 1,000"):
        read_torch_index(path)


def test_entries_that_overlap(tmp_path):
    """A zip bomb without compression: many entries of the same bytes."""
    path = put(tmp_path / "made.pth", pickled({"w": Made()}), ("archive/data/1", bytes(16)))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"archive/data/{i}").header_offset for i in (0, 1))
    place = data.rindex(second.to_bytes(4, "little"), 0, data.rindex(b"archive/data/1"))
    moved = data[:place] + first.to_bytes(4, "little") + data[place + 4 :]
    path.write_bytes(moved)
    with pytest.raises(ValueError, match="is not where the zip says"):
        read_torch_index(path)
    path.write_bytes(data[:second] + data[second:].replace(b"archive/data/1", b"archive/data/0", 1))
    with pytest.raises(ValueError, match="'archive/data/1' is not where the zip says"):
        read_torch_index(path)


def test_an_entry_that_reaches_into_the_next(tmp_path):
    path = put(tmp_path / "made.pth", pickled({"w": Made()}))
    data = path.read_bytes()
    central = data.rindex(b"PK\x01\x02")
    sizes = data[central + 20 : central + 28]
    assert sizes == (16).to_bytes(4, "little") * 2
    path.write_bytes(data[: central + 20] + (1 << 20).to_bytes(4, "little") * 2 + data[central + 28 :])
    with pytest.raises(ValueError, match="'archive/data/0' reaches into what follows it"):
        read_torch_index(path)
    last = (16 + len(data) - central).to_bytes(4, "little") * 2  # to the end of the file: the directory is no value
    path.write_bytes(data[: central + 20] + last + data[central + 28 :])
    with pytest.raises(ValueError, match="'archive/data/0' reaches into what follows it"):
        read_torch_index(path)


@pytest.mark.parametrize("kept", [0, 3, 100, 700, -100, -10])
def test_cut_off_files(tmp_path, kept):
    path = tmp_path / "some.pth"
    torch.save({"weight": BASE}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path}: (cut off, or damaged|is not a zip file of torch.save)"):
        read_torch_index(path)


def test_a_file_that_shrinks_meanwhile(tmp_path):
    path = tmp_path / "some.pth"
    torch.save({"weight": BASE, "columns": BASE.T}, path)
    found = read_torch_index(path)
    path.write_bytes(path.read_bytes()[: found["weight"].start + 8])
    for name in found:
        with pytest.raises(ValueError, match="has become shorter"):
            read(path, found[name])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_the_old_kind_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"weight": BASE}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not a zip file of torch.save; .* torch.save\(torch.load\(FILE, weights_on"):
        read_torch_index(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert isinstance(read_torch_index(path)["weight"], TorchTensor)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_torch_index(tmp_path / "absent.pth")
