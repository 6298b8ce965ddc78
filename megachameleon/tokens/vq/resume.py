"""What lets an interrupted training go on: the checkpoint, and whether it belongs to the same job."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megachameleon.files import atomic_path, read_json, write_text
from megachameleon.tokens.vq.tokenizer import CONFIG_FILE

CHECKPOINT_FILE = "checkpoint.safetensors"
"""In the output folder; removed when the tokenizer is complete."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come."""

    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """They took, those of interrupted runs included."""


def write_checkpoint(
    folder: Path, flags: Mapping[str, Any], pictures: str, progress: Progress, state: Mapping[str, Tensor]
) -> None:
    """Write the checkpoint whole, in the place of the last one.

    Args:
        flags: plain values that a resumed run must share.
        pictures: fingerprint of what is trained on.
    """
    metadata = {
        "flags": json.dumps(flags),
        "pictures": pictures,
        "step": str(progress.step),
        "seconds": str(progress.seconds),
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with atomic_path(folder / CHECKPOINT_FILE) as temporary:
        save_file(tensors, temporary, metadata)


def read_checkpoint(folder: Path, flags: Mapping[str, Any]) -> tuple[Progress, str, dict[str, Tensor]] | None:
    """Progress, fingerprint of the pictures, and state; None where there is no checkpoint.

    Raises:
        ValueError: damaged, or made with other flags.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = json.loads(metadata["flags"])
        progress = Progress(int(metadata["step"]), float(metadata["seconds"]))
        pictures = metadata["pictures"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); remove it to start from the first step") from None
    require_same_flags(flags, saved, path)
    return progress, pictures, tensors


def is_complete(folder: Path, flags: Mapping[str, Any]) -> bool:
    """Whether the folder holds the finished tokenizer of this job.

    Raises:
        ValueError: it holds that of another one.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return False
    header = read_json(path)
    provenance = header.get("provenance") if isinstance(header, dict) else None
    require_same_flags(flags, provenance.get("flags") if isinstance(provenance, dict) else None, path)
    return True


def require_same_flags(flags: Mapping[str, Any], saved: Any, path: Path) -> None:
    """Refuse to go on with other flags.

    Raises:
        ValueError: names those that differ.
    """
    # as JSON gives it back: lists for tuples
    mine = json.loads(json.dumps(flags))
    if saved == mine:
        return
    saved = saved if isinstance(saved, dict) else {}
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for before, now in _pairs_of_levels(saved, mine)
        for name in now
        if before.get(name) != now.get(name) and not isinstance(now.get(name), dict)
    ]
    raise ValueError(
        f"{path}: made with other flags ({'; '.join(different)}); give the same flags, or another --output"
    )


def cut_metrics(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
    # a kill may have cut the last line
    entries = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in entries))


def _pairs_of_levels(saved: dict[str, Any], mine: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    yield saved, mine
    for name, values in mine.items():
        if isinstance(values, dict):
            before = saved.get(name)
            yield before if isinstance(before, dict) else {}, values
