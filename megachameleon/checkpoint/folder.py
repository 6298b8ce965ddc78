"""The folder of a run's checkpoints: which exist, which is newest, which are whole.

A checkpoint is written under a temporary name and renamed when its manifest, which lists every file with size and
SHA-256, is on the disk. What has no manifest does not exist. The file `latest` names the newest for people and scripts;
it is written last, so where it disagrees with the folder, a process was killed in between and the folder is right.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, sha256_of, write_json

FORMAT = 2
"""Of the whole folder; others are refused, not converted."""
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
COMMON_FILE = "common.json"
CONFIG_FILE = "config.yaml"
PROGRESS_FILE = "progress.json"
LATEST_FILE = "latest"
SEAL = "sha256"
"""The manifest's own hash, over all its other fields."""
DAMAGED = ".damaged"
"""Stands behind the name of what was set aside."""


class DamagedCheckpointError(ValueError):
    """A checkpoint's bytes are not those that were written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Position in the blend."""
    data_fingerprint: str
    """What decided all samples before that position (`BlendedSamples.history`)."""
    versions: dict[str, str]
    """Of the software that wrote it, by package."""
    vocabulary: dict[str, Any]
    """The fields of `Vocabulary`."""
    tokenizers: dict[str, str | None]
    """Fingerprints of the `text` and `image` tokenizers that made the data."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by file name."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Where it comes from (`checkpoint/lineage.py`)."""
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The steps after which a checkpoint was saved, from its folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def named_checkpoints(root: Path) -> list[Path]:
    """Folders with the name of a checkpoint, whatever is in them, oldest first."""
    if not root.is_dir():
        return []
    # by number: names of more than eight digits would sort wrongly
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints of a run that have a manifest, oldest first."""
    return [path for path in named_checkpoints(root) if (path / MANIFEST_FILE).is_file()]


def damaged_checkpoints(root: Path) -> list[Path]:
    """Checkpoints that a run has found damaged and set aside."""
    return sorted(root.glob(f"step_*{DAMAGED}*")) if root.is_dir() else []


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint's folder from itself, a run's `checkpoints` folder, or a run's folder (its newest).

    Manifest and sizes are checked here; hashes where the checkpoint is loaded.

    Raises:
        ValueError: there is no complete checkpoint.
        DamagedCheckpointError: the newest is damaged; names the one before it.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    # the folder is asked and not `latest`, which a kill may have left behind it
    for root in (path, path / "checkpoints"):
        found = named_checkpoints(root)
        if found:
            return _require_whole(found)
    aside = [folder.name for root in (path, path / "checkpoints") for folder in damaged_checkpoints(root)]
    what = f" ({', '.join(aside)} set aside)" if aside else ""
    raise ValueError(f"{path}: no complete checkpoint here{what}; give a run's folder or one of its checkpoints/step_*")


def _require_whole(checkpoints: list[Path]) -> Path:
    """The newest, which must be whole."""
    try:
        read_manifest(checkpoints[-1])
    except DamagedCheckpointError as error:
        before = next((path for path in reversed(checkpoints[:-1]) if is_whole(path)), None)
        remedy = f"give {before}, the one before it" if before else "there is no whole one before it"
        raise DamagedCheckpointError(f"{error}; {remedy}") from None
    return checkpoints[-1]


def is_whole(checkpoint: Path) -> bool:
    """Whether the manifest can be read and all files have their sizes."""
    try:
        read_manifest(checkpoint)
    except ValueError:
        return False
    return True


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write a manifest with a hash of itself."""
    values = asdict(manifest)
    write_json(checkpoint / MANIFEST_FILE, {**values, SEAL: _seal(values)})


def parse_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a manifest alone.

    Raises:
        DamagedCheckpointError: it is missing, is not JSON, or was changed.
        ValueError: another format, or a file name that leaves the folder.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        values = read_json(path)
    except UnicodeDecodeError:
        raise DamagedCheckpointError(f"{path}: not text; the checkpoint is damaged") from None
    except ValueError as error:
        raise DamagedCheckpointError(f"{str(error).partition(';')[0]}; the checkpoint is damaged") from None
    if not isinstance(values, dict) or not isinstance(values.get("format"), int):
        raise DamagedCheckpointError(f"{path}: not a checkpoint's manifest; the checkpoint is damaged")
    # before the seal, since another format may compute it otherwise
    if values["format"] != FORMAT:
        raise ValueError(
            f"{checkpoint}: checkpoint format {values['format']}, this release reads format {FORMAT}; "
            "go on with the one that wrote it"
        )
    if values.pop(SEAL, None) != _seal(values):
        raise DamagedCheckpointError(f"{path}: was changed after it was written; the checkpoint is damaged")
    try:
        manifest = CheckpointManifest(**values)
    except TypeError as error:
        raise ValueError(
            f"{path}: not a manifest of this release ({error}); go on with the one that wrote it"
        ) from None
    if not _is_sound(manifest):
        raise DamagedCheckpointError(f"{path}: not a checkpoint's manifest; the checkpoint is damaged")
    for name in manifest.files:
        # names from a file must not lead out of the folder
        if Path(name).name != name:
            raise ValueError(f"{checkpoint}: file name {name!r} leaves the checkpoint's folder; refused")
    return manifest


def _is_sound(manifest: CheckpointManifest) -> bool:
    """Whether it has the types that it should have; a seal does not keep anybody from writing others."""
    numbers = (manifest.step, manifest.consumed_samples)
    parts = (manifest.versions, manifest.vocabulary, manifest.tokenizers, manifest.files, manifest.lineage)
    return (
        all(isinstance(number, int) for number in numbers)
        and all(isinstance(part, dict) for part in (*parts, *manifest.files.values()))
        and all({"size", "sha256"} <= file.keys() for file in manifest.files.values())
    )


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a manifest and check the sizes of all files that it lists.

    Raises:
        DamagedCheckpointError: it or a file is missing, or another than was written.
        ValueError: another format, or a file name that leaves the folder.
    """
    manifest = parse_manifest(checkpoint)
    verify_sizes(checkpoint, manifest.files, manifest)
    return manifest


def verify_sizes(checkpoint: Path, names: Iterable[str], manifest: CheckpointManifest) -> None:
    """Compare files with their sizes.

    Raises:
        DamagedCheckpointError: one is missing or of another size.
    """
    for name in names:
        file, wanted = checkpoint / name, manifest.files[name]["size"]
        size = file.stat().st_size if file.is_file() else None
        if size != wanted:
            found = "missing" if size is None else f"{size} bytes"
            raise DamagedCheckpointError(f"{file}: {found}, the manifest says {wanted}; the checkpoint is damaged")


def verify_hashes(checkpoint: Path, names: Iterable[str], manifest: CheckpointManifest) -> None:
    """Compare files with their SHA-256.

    Raises:
        DamagedCheckpointError: a file's bytes have changed.
    """
    for name in names:
        if sha256_of(checkpoint / name) != manifest.files[name]["sha256"]:
            raise DamagedCheckpointError(
                f"{checkpoint / name}: its SHA-256 differs from the manifest's; the checkpoint is damaged"
            )


def _seal(values: dict[str, Any]) -> str:
    """The hash of a manifest's content, by which a changed byte is told from another training."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
