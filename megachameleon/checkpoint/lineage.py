"""Where a checkpoint comes from: the software, the data, the checkpoint before it, and every start of its run."""

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import megachameleon
from megachameleon.checkpoint.folder import MANIFEST_FILE, CheckpointManifest, parse_manifest
from megachameleon.files import sha256_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestor:
    """A checkpoint, told from all others by the hash of its manifest, which holds those of its files."""

    path: str
    """Absolute, when it was noted; it may have moved since."""
    step: int
    """Optimizer steps done."""
    manifest_sha256: str
    """In hexadecimal."""

    @classmethod
    def of(cls, checkpoint: Path) -> "Ancestor":
        """A checkpoint on the disk, whatever its folder is called by now."""
        path = checkpoint.absolute()
        return cls(path=str(path), step=parse_manifest(path).step, manifest_sha256=sha256_of(path / MANIFEST_FILE))


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A start of the program that led to a checkpoint."""

    kind: Literal["new", "resume", "init_from"]
    """From nothing, from a checkpoint of the same run, or from another's weights."""
    source: Ancestor | None
    """What it started from; None for `new`."""
    time: str
    """UTC."""
    commit: str
    """Of the checkout, or `unknown`."""
    world_size: int
    """Processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """All that is known of a checkpoint's origin."""

    datasets: dict[str, dict[str, Any]]
    """What its samples are drawn from: fingerprint of the samples, hash over the data files, and counts, by dataset."""
    parent: Ancestor | None
    """The checkpoint before it: saved by this run, or started from."""
    starts: tuple[Start, ...]
    """Oldest first; those of a run whose weights were taken stand before its own."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def followed(self, parent: Ancestor) -> "Lineage":
        """That of the next checkpoint."""
        return replace(self, parent=parent)


def begin_lineage(
    datasets: dict[str, dict[str, Any]],
    kind: Literal["new", "resume", "init_from"],
    source: Path | None,
    manifest: CheckpointManifest | None,
    *,
    commit: str,
    world_size: int,
) -> Lineage:
    """The lineage of what this start of the program will save.

    Args:
        source: the checkpoint that it goes on from, if there is one, and its `manifest`.
    """
    before = (manifest.lineage if manifest else {}).get("starts", [])
    parent = Ancestor.of(source) if source else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = Start(kind=kind, source=parent, time=now, commit=commit, world_size=world_size)
    return Lineage(datasets=datasets, parent=parent, starts=(*map(_start_from, before), start))


def _start_from(values: dict[str, Any]) -> Start:
    source = values["source"]
    return Start(**{**values, "source": Ancestor(**source) if source else None})


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of a checkout, for the record."""
    packages = ("torch", "megatron-core", "numpy", "sentencepiece")
    # from metadata, so that nothing need be imported for it
    found = {name: importlib.metadata.version(name) for name in packages}
    return {
        "megachameleon": megachameleon.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **found,
    }


def _commit() -> str:
    """The commit, with `-dirty` behind it if tracked files were changed since."""
    # --exclude=*: a tag would stand in the place of the commit
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
