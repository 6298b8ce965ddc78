"""The folder of a run's checkpoints: which exist, which is newest, which are whole.

A checkpoint is written under a temporary name and renamed when its manifest, which lists every file with size and
SHA-256, is on the disk. What has no manifest does not exist.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, sha256_of, sync_directory, write_json, write_text

FORMAT = 2
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
COMMON_FILE = "common.json"
CONFIG_FILE = "config.yaml"
PROGRESS_FILE = "progress.json"
LATEST_FILE = "latest"


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
    vocabulary: dict[str, Any]
    tokenizers: dict[str, str | None]
    """Fingerprints of the `text` and `image` tokenizers that made the data."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by file name."""
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The steps after which a checkpoint was saved, from its folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not root.is_dir():
        return []
    names = (path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted((path for path in names if (path / MANIFEST_FILE).is_file()), key=step_of)


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint's folder from itself, a run's `checkpoints` folder, or a run's folder (its newest).

    Raises:
        ValueError: there is no complete checkpoint.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = complete_checkpoints(root)
        if found:
            return found[-1]
    raise ValueError(f"{path}: no complete checkpoint here; give a run's folder or one of its checkpoints/step_*")


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read and check a manifest and the sizes of the files it lists.

    Raises:
        ValueError: no manifest, another format, or a file that is missing or of another size.
    """
    values = read_json(checkpoint / MANIFEST_FILE)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else "none"
        raise ValueError(
            f"{checkpoint}: checkpoint format {found}, this release reads format {FORMAT}; "
            "go on with the release that wrote it"
        )
    try:
        manifest = CheckpointManifest(**values)
    except TypeError as error:
        raise ValueError(f"{checkpoint / MANIFEST_FILE}: not a checkpoint's manifest ({error})") from None
    for name, record in manifest.files.items():
        file = checkpoint / name
        if Path(name).name != name:
            raise ValueError(f"{checkpoint}: file name {name!r} leaves the checkpoint's folder; refused")
        size = file.stat().st_size if file.is_file() else None
        if size != record["size"]:
            raise ValueError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, the manifest says {record['size']}; "
                "the checkpoint is damaged: delete it to go on from the one before"
            )
    return manifest


def verify_hashes(checkpoint: Path, names: list[str], manifest: CheckpointManifest) -> None:
    """Compare files with their SHA-256.

    Raises:
        ValueError: a file's bytes have changed.
    """
    for name in names:
        if sha256_of(checkpoint / name) != manifest.files[name]["sha256"]:
            raise ValueError(
                f"{checkpoint / name}: its SHA-256 differs from the manifest's; "
                "the checkpoint is damaged: delete it to go on from the one before"
            )


def temporary_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return root / f".{checkpoint_name(step)}.tmp"


def publish(temporary: Path, root: Path, manifest: CheckpointManifest, to_json: Callable[[Any], Any]) -> Path:
    """Write the manifest, rename the folder into place and point `latest` at it."""
    write_json(temporary / MANIFEST_FILE, to_json(manifest))
    final = root / checkpoint_name(manifest.step)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(root)
    write_text(root / LATEST_FILE, final.name + "\n")
    return final


def delete_old(root: Path, keep_last: int) -> None:
    """Delete all but the newest complete checkpoints, and what interrupted saves and deletions have left."""
    for path in complete_checkpoints(root)[:-keep_last]:
        # Take away the manifest first: a half-deleted checkpoint must not look complete.
        (path / MANIFEST_FILE).unlink()
    incomplete = [path for path in root.glob("step_*") if path.is_dir() and not (path / MANIFEST_FILE).exists()]
    for path in (*incomplete, *root.glob(".step_*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
