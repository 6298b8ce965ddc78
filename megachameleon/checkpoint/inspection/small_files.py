"""Small files of a checkpoint, read as far as they can be: bounded, never outside the folder."""

from pathlib import Path
from typing import Any

from megachameleon.checkpoint.inspection.raw import RawFile, SafetensorsFile
from megachameleon.checkpoint.inspection.report import FileInfo
from megachameleon.files import read_json

MOST_BYTES = 64 << 20
MOST_INDEX_BYTES = 1 << 30
SUFFIXES_OF_TORCH = (".pth", ".pt", ".bin", ".ckpt")


def read_mapping(path: Path, problems: list[str], most: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON object; where there is none, nothing, and a problem."""
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"{path.name}: {size:,} bytes are no {path.name}")
        found = read_json(path)
    except (OSError, ValueError) as error:
        problems.append(_in_folder(path, error))
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name}: no JSON object")
        return {}
    return found


def open_files(folder: Path, names: list[str], problems: list[str]) -> dict[str, RawFile]:
    """Headers of files with tensors, by name; what is wrong with them goes to `problems`."""
    opened: dict[str, RawFile] = {}
    for name in names:
        try:
            file = open_file(folder / name)
        except (OSError, ValueError) as error:
            problems.append(_in_folder(folder / name, error))
            continue
        opened[name] = file
        problems.extend(file.problems)
    return opened


def open_file(path: Path) -> RawFile:
    """A file of tensors by its ending.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is none that could be read.
    """
    if path.suffix in SUFFIXES_OF_TORCH:
        from megachameleon.checkpoint.inspection.raw_torch import TorchFile

        return TorchFile(path)
    return SafetensorsFile(path)


def file_info(folder: Path, name: str, raw: RawFile | None = None, holds: str = "", **digests: str) -> FileInfo:
    """Its size and what is in it."""
    path = folder / name
    size = path.stat().st_size if path.is_file() else None
    return FileInfo(name=name, num_bytes=size, num_tensors=len(raw.tensors) if raw else 0, holds=holds, digests=digests)


def _in_folder(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{path.name}: {(error.strerror or 'cannot be read').lower()}"
    return str(error).replace(f"{path}", path.name)
