"""Files of Hugging Face's: safetensors with or without an index, read without trusting what they say."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachameleon.checkpoint.boxes import Shape
from megachameleon.checkpoint.formats.dtypes import widest
from megachameleon.checkpoint.formats.huggingface.names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from megachameleon.files import read_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def read_headers(folder: Path) -> tuple[dict[str, str], dict[str, Shape], dict[str, str]]:
    """File, shape and type of every tensor in a folder of safetensors files; only headers are read.

    Raises:
        ValueError: there are none, one is missing or damaged, or the index is not theirs.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if not index.is_file():
        if not single.is_file():
            _refuse_pickles(folder)
            raise ValueError(
                f"{folder}: neither {INDEX_FILE} nor {WEIGHTS_FILE}; give a folder with a model in safetensors"
            )
        return _headers(folder, [WEIGHTS_FILE])
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: has no 'weight_map' from tensors to files; copy it again")
    for name in set(weight_map.values()):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: names the file {name!r}, which is not beside it; copy it there")
    found = _headers(folder, sorted(set(weight_map.values())))
    # Both ways: a tensor that the index does not name would be lost without a word.
    wrong = sorted(name for name in {*weight_map, *found[0]} if weight_map.get(name) != found[0].get(name))
    if wrong:
        raise ValueError(f"{index}: tensors are not where it says: {', '.join(wrong)}; copy index and files again")
    return found


def _refuse_pickles(folder: Path) -> None:
    """Say how to go on where a folder has weights that loading may execute."""
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise ValueError(
            f"{folder}: its weights are pickles ({pickles[0]}), which run what is in them when they are opened; only "
            "safetensors are read: download those of the same model, or save it with transformers "
            "(model.save_pretrained writes them)"
        )


def _headers(folder: Path, names: list[str]) -> tuple[dict[str, str], dict[str, Shape], dict[str, str]]:
    files: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for file_name in names:
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    files[name], shapes[name], dtypes[name] = file_name, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            path = folder / file_name
            raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error}); copy it again") from None
    return files, shapes, dtypes


def open_tensor(path: Path, name: str, part: tuple[slice, ...] = ()) -> Tensor:
    """A tensor of a file, or a part of it; nothing else of the file is read.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[part] if part else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None


def widest_dtype(folder: Path, kinds: set[str]) -> torch.dtype:
    """One type that holds all values of tensors of these types, such as `BF16`.

    Raises:
        ValueError: a type that weights do not have.
    """
    return widest(folder, {str(DTYPES[kind]).removeprefix("torch.") if kind in DTYPES else kind for kind in kinds})


def folder_identity(folder: Path, files: set[str]) -> str:
    """A hash that changes when config.json or one of these files does.

    By names, sizes and times, since reading all bytes would take as long as converting them.
    """
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name in sorted(files):
        digest.update(f"{file_state(folder / name)}\n".encode())
    return digest.hexdigest()


def file_state(path: Path) -> str:
    """Name, size and time of a file, which change when somebody writes another one in its place."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
