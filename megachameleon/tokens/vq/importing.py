"""Chameleon's image tokenizer from the files of others: Meta's `vqgan.ckpt` and Hugging Face's `model.vqmodel`.

Tensors are found by name; nothing in a file is executed.
"""

import difflib
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachameleon.files import read_json, require_free_space, require_usable_folder, sha256_of
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import CONFIG_FILE, PRECISIONS, ImageTokenizer, save_image_tokenizer
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGAN, VQGANConfig, tensor_shapes

INDEX_FILE = "model.safetensors.index.json"
FILES_IN_FOLDERS = (INDEX_FILE, "model.safetensors", "vqgan.ckpt", "tokenizer/vqgan.ckpt")
"""What is looked for in a folder, in this order."""
DISK_BYTES_PER_PARAMETER = 5
"""Four of fp32, and room for what is beside."""
NAMES_SHOWN = 3
"""Of missing and of unknown tensors, in errors."""
NOTICE = (
    "If these weights come from Meta's Chameleon release, the Chameleon Research License of Meta Platforms, Inc. holds "
    "for them and for what is derived from them: noncommercial research only, and copies go with Meta's agreement, "
    "notice and acknowledgement. Keep Meta's LICENSE file beside this one."
)


@dataclass(frozen=True, kw_only=True)
class _Found:
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    layout: str


def import_image_tokenizer(
    source: Path, folder: Path, *, precision: str = "fp32", config: VQGANConfig | None = None
) -> ImageTokenizer:
    """Write the image tokenizer in `source` as a folder of this project, and load it from there.

    Args:
        source: Meta's `vqgan.ckpt`; a safetensors file with Hugging Face's names, under any prefix; or a folder with
            either (a sharded Hugging Face checkpoint too).
        precision: in which the tokenizer is to compute, `fp32` (as Meta does) or `bf16`.
        config: another shape than Chameleon's.

    Returns:
        The tokenizer, on the CPU. `can_decode` is False if the source has no decoder, as Hugging Face's.

    Raises:
        ValueError: `source` is damaged, holds other objects than tensors, or other tensors than the shape needs;
            `folder` holds a tokenizer already.
    """
    source, folder, config = Path(source), Path(folder), config or VQGANConfig()
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be {' or '.join(PRECISIONS)}")
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder}: holds an image tokenizer already; give another folder, or remove it")
    require_usable_folder(folder)
    found = _read(source)
    tensors = _require_tensors(found.tensors, config, source)
    num_values = sum(tensor.numel() for tensor in tensors.values())
    require_free_space(folder, DISK_BYTES_PER_PARAMETER * num_values, "an image tokenizer")
    provenance = {
        "files": [{"name": path.name, "sha256": sha256_of(path)} for path in found.files],
        "layout": found.layout,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "notice": NOTICE,
    }
    codebook = Codebook(config.num_codes, config.code_dim)
    codebook.codes.copy_(tensors.pop(CODEBOOK_TENSOR))
    # no memory and no random numbers for weights that are replaced at once
    with torch.device("meta"):
        # Hugging Face's files leave the decoder out
        network = VQGAN(config, with_decoder=any(name.startswith("decoder.") for name in tensors))
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    save_image_tokenizer(folder, config, network, codebook, provenance, precision=precision)
    return ImageTokenizer.load(folder)


def _read(source: Path) -> _Found:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    path = source
    if source.is_dir():
        present = [source / name for name in FILES_IN_FOLDERS if (source / name).is_file()]
        if not present:
            raise ValueError(f"{source}: none of {', '.join(FILES_IN_FOLDERS)} in this folder; give the file itself")
        path = present[0]
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _Found(tensors=_read_torch_file(path), files=(path,), layout="meta")


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file without those of the training loss; unpickles tensors and plain values only."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        other = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if other:
            raise ValueError(
                f"{path}: holds an object of {other[1]}, and only tensors and plain values are read; nothing of it was "
                "executed. Take the file from its publisher, or save its tensors alone as safetensors"
            ) from None
        raise ValueError(f"{path}: not a torch file, or a damaged one; copy or download it again") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: has no 'state_dict' of named tensors; give Meta's vqgan.ckpt")
    # Meta's file may hold the discriminator and LPIPS of its training under this prefix
    tensors = {name: value for name, value in state.items() if not name.startswith("loss.")}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name!r} is of type {type(value).__name__}, not a tensor; give Meta's vqgan.ckpt"
            )
    return tensors


def _read_safetensors(path: Path) -> _Found:
    try:
        with safe_open(path, framework="pt") as file:
            prefix = _prefix(file.keys(), path)
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error}); copy it again") from None
    return _Found(tensors=tensors, files=(path,), layout="huggingface")


def _read_shards(index: Path) -> _Found:
    """The tensors that an index places in files beside it; only the files that hold any of ours are opened."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: has no 'weight_map' from tensors to files; copy it again")
    prefix = _prefix(places, index)
    by_file: dict[str, list[str]] = {}
    for name, file_name in places.items():
        if name.startswith(prefix):
            by_file.setdefault(file_name, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file_name, names in by_file.items():
        path = index.parent / file_name
        # an index from strangers must not name files elsewhere
        if Path(file_name).name != file_name or not path.is_file():
            raise ValueError(f"{index}: names the file {file_name!r}, which is not beside it; copy it there")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not what {index.name} says ({error}); copy both again") from None
    return _Found(tensors=tensors, files=tuple(index.parent / name for name in sorted(by_file)), layout="huggingface")


def _prefix(names: Iterable[str], path: Path) -> str:
    """What stands before the names of Meta's file: `model.vqmodel.` in Hugging Face's Chameleon."""
    names = list(names)
    # the codebook's name is the same in every layout, whatever stands before it
    prefixes = [name.removesuffix(CODEBOOK_TENSOR) for name in names if name.endswith(CODEBOOK_TENSOR)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{path}: {len(prefixes) or 'no'} tensors named …{CODEBOOK_TENSOR}{_nearest(CODEBOOK_TENSOR, names)}; "
            "Chameleon's image tokenizer has one. Give the files of a ChameleonForConditionalGeneration"
        )
    return prefixes[0]


def _require_tensors(tensors: Mapping[str, Tensor], config: VQGANConfig, source: Path) -> dict[str, Tensor]:
    """The tensors that `config` needs, all of them and no other; those of the decoder may be missing together."""
    shapes = tensor_shapes(config)
    if not any(name.startswith("decoder.") for name in tensors):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("decoder.")}
    missing, unknown = [name for name in shapes if name not in tensors], [n for n in tensors if n not in shapes]
    if missing or unknown:
        problems = [f"{name} is missing{_nearest(name, unknown)}" for name in missing[:NAMES_SHOWN]]
        problems += [f"{name} is unknown{_nearest(name, missing)}" for name in unknown[:NAMES_SHOWN]]
        raise ValueError(
            f"{source}: {len(missing)} tensors are missing and {len(unknown)} unknown for a VQ-GAN of this shape: "
            f"{'; '.join(problems)}. Give that of a Chameleon, whole"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{source}: {name} is {_describe(tensor)}; expected floats of shape {list(shape)}")
        # one NaN in a norm would make every picture the same code
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{source}: {name} holds values that are not finite; copy or download the file again")
    return dict(tensors)


def _nearest(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f" (near: {close[0]})" if close else ""


def _describe(tensor: Tensor) -> str:
    layout: Any = "" if tensor.layout == torch.strided else f"{tensor.layout} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
