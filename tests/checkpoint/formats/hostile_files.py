"""Files that lie, break off, or would run something: made from sound ones, byte by byte where no writer would."""

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


class Storage:
    """Stands in a pickle for the storage of a tensor."""

    def __init__(self, kind, key, count):
        self.kind, self.key, self.count = kind, key, count


class Tensor:
    """Pickled as torch pickles a tensor, with whatever it claims."""

    def __init__(self, storage, offset, shape, stride):
        self.arguments = (storage, offset, tuple(shape), tuple(stride), False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class TorchPickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, Storage) else None


KINDS = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage}


def write_torch_file(path, state, *, claim=None, entries=None, prefix="archive", compression=zipfile.ZIP_STORED):
    """A file of `torch.save`, written by hand.

    Args:
        claim: what to say of the first matrix instead of the truth: any of storage, offset, shape, stride.
        entries: further entries of the zip by their names.
    """
    claims, told = claim or {}, {}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, (name, tensor) in enumerate(state.items()):
            archive.writestr(f"{prefix}/data/{key}", tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            mine = claims if key == 0 else {}
            storage = Storage(KINDS[tensor.dtype], str(key), mine.get("storage", tensor.numel()))
            shape, stride = mine.get("shape", tensor.shape), mine.get("stride", tensor.stride())
            told[name] = Tensor(storage, mine.get("offset", 0), shape, stride)
        with archive.open(f"{prefix}/data.pkl", "w") as file:
            TorchPickler(file, protocol=2).dump(told)
        archive.writestr(f"{prefix}/version", "3\n")
        for name, data in (entries or {}).items():
            archive.writestr(name, data)


def edit_json(path, change):
    """Let a function change what a JSON file holds."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_safetensors_header(path, change):
    """Let a function change the header of a safetensors file; the bytes of its tensors stay."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def cut_off(path, count=100):
    """Leave out the last bytes."""
    path.write_bytes(path.read_bytes()[:-count])
