"""What one node finds out about itself: GPUs, memory, clock, storage."""

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, write_json
from megachameleon.launching.nvidia_smi import Gpu, query_gpus

BLOCK_BYTES = 8 * 2**20


@dataclass(kw_only=True, slots=True)
class NodeCheck:
    """One node's findings; None where nothing could be measured."""

    host: str
    """By which SLURM knows it."""
    gpus: list[Gpu] | None = None
    """None: no nvidia-smi."""
    memory_gib: float | None = None
    """Host memory that a job could have now."""
    clock_offset: float | None = None
    """Seconds that this node's clock is ahead of the first node's."""
    write_gb_per_second: float | None = None
    """Of shared storage, made durable; 1e9 bytes."""
    read_gb_per_second: float | None = None
    """The same, past the page cache."""
    inside_gb_per_second: float | None = None
    """All-reduce bandwidth among the ranks of the node."""
    pair_gb_per_second: dict[str, float] = field(default_factory=dict)
    """All-reduce bandwidth with another node, by its name."""
    problems: list[str] = field(default_factory=list)
    """What failed on the way."""

    @property
    def across_gb_per_second(self) -> float | None:
        """With its better partner: a slow partner is not this node's fault."""
        return max(self.pair_gb_per_second.values(), default=None)

    def write(self, folder: Path) -> None:
        """Leave the findings so far; what hangs afterwards cannot take them away."""
        write_json(folder / f"{self.host}.json", asdict(self))


def read_check(path: Path) -> NodeCheck:
    """Read what `NodeCheck.write` wrote.

    Raises:
        ValueError: it is something else.
    """
    value: dict[str, Any] = read_json(path)
    try:
        gpus = value.pop("gpus")
        return NodeCheck(gpus=None if gpus is None else [Gpu(**gpu) for gpu in gpus], **value)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the check of a node ({error}); remove it") from None


def look_at_itself(check: NodeCheck, folders: Sequence[Path], num_bytes: int) -> None:
    """Fill in what needs no other node.

    Args:
        folders: shared paths that must be writable; bandwidth is measured in the first.
        num_bytes: to write and to read.
    """
    try:
        check.gpus = query_gpus()
    except (RuntimeError, OSError, ValueError) as error:
        check.problems.append(str(error))
    check.memory_gib = available_memory_gib()
    for folder in folders[1:]:
        _measure(check, folder, 0)
    if folders:
        speeds = _measure(check, folders[0], num_bytes)
        if speeds is not None:
            check.write_gb_per_second, check.read_gb_per_second = speeds


def available_memory_gib(path: Path = Path("/proc/meminfo")) -> float | None:
    """`MemAvailable` in GiB."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    # The kernel says it in KiB.
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


def _measure(check: NodeCheck, folder: Path, num_bytes: int) -> tuple[float, float] | None:
    try:
        return storage_speed(folder, check.host, num_bytes)
    except OSError as error:
        check.problems.append(f"{folder}: {(error.strerror or str(error)).lower()}")
        return None


def storage_speed(folder: Path, name: str, num_bytes: int) -> tuple[float, float]:
    """Write a file durably, read it without the page cache; GB/s of both. 0 bytes: try only whether it works.

    Raises:
        OSError: the folder cannot be used.
    """
    path = folder / f".preflight-{name}-{os.getpid()}"
    block = secrets.token_bytes(BLOCK_BYTES)  # what can be compressed would flatter some file systems
    count = -(-num_bytes // BLOCK_BYTES)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            # After fsync: pages that are not written yet would stay in the cache.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter() - start
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass
        read = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    total = count * BLOCK_BYTES / 1e9
    return total / written, total / read
