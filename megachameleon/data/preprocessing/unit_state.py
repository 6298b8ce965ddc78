"""Where the units of a plan stand: finished, being made, failed, or still to do; seen from the outside."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from megachameleon.data.plan import Plan, Unit
from megachameleon.data.preprocessing.unit_run import file_records, shard_options
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import shard_file
from megachameleon.data.shards.writer import open_writers
from megachameleon.files import sha256_of, write_text

LOOKERS = 16
"""Threads that look at once; a file system over a network answers each of them slowly."""
RATE_WINDOW = 3600.0
"""Seconds of the recent past that tell how fast units become finished."""

State = Literal["finished", "running", "failed", "missing", "stale"]


@dataclass(frozen=True, slots=True)
class UnitState:
    """Where a unit stands."""

    unit: Unit
    state: State
    problem: str | None
    """Why it still has to be run; None when it is finished."""
    manifest: ShardManifest | None
    """Its manifest when it is finished."""
    finished_at: float = 0.0
    """When its manifest was written, in seconds since 1970."""


def unit_state(
    plan: Plan, unit: Unit, writers: Mapping[str, str] = MappingProxyType({}), *, indexes: bool = False
) -> UnitState:
    """Where a unit stands, by its manifest and the sizes of its files; `verify` reads all of them.

    Args:
        writers: who is writing which shard (`open_writers`).
        indexes: also compare the hashes of `.idx` and `.spans`, which are small.
    """
    prefix = plan.folder / unit.name
    manifest_path = shard_file(prefix, ".json")
    try:
        finished_at = manifest_path.stat().st_mtime
    except FileNotFoundError:
        return _unfinished(unit, prefix, writers.get(unit.name))
    try:
        manifest = ShardManifest.load(manifest_path)
    except ValueError as error:
        return UnitState(unit, "stale", str(error), None)
    problem = _contradiction(plan, unit, manifest) or _wrong_size(prefix, manifest)
    if indexes and problem is None:
        problem = _wrong_index(prefix, manifest)
    if problem:
        return UnitState(unit, "stale", problem, None)
    return UnitState(unit, "finished", None, manifest, finished_at)


def unit_states(plan: Plan, units: Iterable[Unit] | None = None, *, indexes: bool = False) -> Iterator[UnitState]:
    """Where units stand, in order; all of the plan by default. `indexes` as for `unit_state`.

    Raises:
        ValueError: a damaged plan.
    """
    writers = open_writers(plan.folder)
    with ThreadPoolExecutor(LOOKERS) as threads:
        chosen = plan.units() if units is None else units
        yield from threads.map(lambda unit: unit_state(plan, unit, writers, indexes=indexes), chosen)


def note_failure(folder: Path, unit: Unit, reason: str) -> None:
    """Leave word of why a unit failed, for `status`."""
    write_text(_failure_file(folder / unit.name), f"{reason}\n")


def forget_failure(folder: Path, unit: Unit) -> None:
    """Remove what `note_failure` left."""
    _failure_file(folder / unit.name).unlink(missing_ok=True)


def bytes_per_second(states: Iterable[UnitState]) -> float | None:
    """Input bytes of the units that became finished within the last hour of work, by the time that took."""
    finished = sorted((s.finished_at, s.unit.bytes) for s in states if s.manifest is not None)
    recent = [item for item in finished if item[0] >= finished[-1][0] - RATE_WINDOW]
    # the first one's bytes were worked on before the window begins, hence recent[1:]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    return sum(size for _, size in recent[1:]) / seconds if seconds >= 1 else None


def _unfinished(unit: Unit, prefix: Path, writer: str | None) -> UnitState:
    if writer is not None:
        return UnitState(unit, "running", f"being made by another run ({writer})", None)
    try:
        reason = _failure_file(prefix).read_text(encoding="utf-8").strip()
        return UnitState(unit, "failed", reason, None)
    except FileNotFoundError:
        return UnitState(unit, "missing", "not run", None)


def _contradiction(plan: Plan, unit: Unit, manifest: ShardManifest) -> str | None:
    # the manifest remembers what its plan decided, so a new plan does not take over old shards
    if manifest.inputs != file_records(unit) or manifest.options != shard_options(plan, unit):
        return "made by another plan"
    if manifest.duplicates > sum(item.num_duplicates for item in unit.inputs):
        return "made by another plan"
    if (manifest.tokenizer, manifest.image_tokenizer) != (plan.tokenizer_fingerprint, plan.image_tokenizer_fingerprint):
        return "made with other tokenizers"
    return None


def _wrong_size(prefix: Path, manifest: ShardManifest) -> str | None:
    for suffix, record in manifest.files.items():
        path = shard_file(prefix, suffix)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return f"{path}: missing"
        if size != record.bytes:
            return f"{path}: {size:,} bytes, but the manifest says {record.bytes:,}"
    return None


def _wrong_index(prefix: Path, manifest: ShardManifest) -> str | None:
    for suffix in (".idx", ".spans"):
        if sha256_of(shard_file(prefix, suffix)) != manifest.files[suffix].sha256:
            return f"{shard_file(prefix, suffix)}: its SHA-256 is not the manifest's, so the file was changed"
    return None


def _failure_file(prefix: Path) -> Path:
    return shard_file(prefix, ".failed.txt")
