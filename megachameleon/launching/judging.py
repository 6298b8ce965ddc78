"""Which nodes are bad: by themselves, or beside the median of the others."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachameleon.launching.node_check import NodeCheck
from megachameleon.launching.nvidia_smi import Gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is let pass. Defaults are cautious choices of ours, not a vendor's."""

    gpus: int = 0
    """GPUs that each node must have."""
    celsius: float = 75.0
    """Before the work begins."""
    idle_gib: float = 1.0
    """GPU memory that may be taken while nobody works: more is a process left behind."""
    clock_seconds: float = 1.0
    """Largest distance of a clock from the first node's."""
    of_median: float = 0.7
    """Smallest part of the median of all nodes, for bandwidths and host memory; for the fastest clock of a GPU, of the
    highest in its node."""


MEASURES: dict[str, tuple[str, Callable[[NodeCheck], float | None]]] = {
    "host memory": ("GiB", lambda check: check.memory_gib),
    "all-reduce inside": ("GB/s", lambda check: check.inside_gb_per_second),
    "all-reduce across": ("GB/s", lambda check: check.across_gb_per_second),
    "storage write": ("GB/s", lambda check: check.write_gb_per_second),
    "storage read": ("GB/s", lambda check: check.read_gb_per_second),
}
"""What is compared with the median, and its unit."""


def require_usable_folders(checks: Sequence[NodeCheck], folders: Sequence[Path]) -> None:
    """Refuse folders that no node can use: their names are wrong, not the nodes.

    Raises:
        ValueError: several nodes have looked, and all say the same of a folder; names it.
    """
    # What one node says alone is that node's fault.
    shared = set.intersection(*(set(check.problems) for check in checks)) if len(checks) > 1 else set()
    wrong = sorted(fault for fault in shared if any(fault.startswith(f"{folder}: ") for folder in folders))
    if wrong:
        raise ValueError(
            f"--folders: {'; '.join(wrong)}, on all of {len(checks)} nodes; name folders that they can write to"
        )


def judge(checks: Sequence[NodeCheck], hosts: Sequence[str], limits: Limits) -> dict[str, list[str]]:
    """What is wrong with each bad node; good ones are not in it.

    Args:
        hosts: all that were asked; those without findings are bad.
    """
    by_host = {check.host: check for check in checks}
    faults: dict[str, list[str]] = {}
    for host in hosts:
        found = by_host.get(host)
        faults[host] = ["no findings: dead, hung or cut off"] if found is None else _faults(found, limits)
    for name, (unit, measure) in MEASURES.items():
        values = {check.host: value for check in checks if (value := measure(check)) is not None}
        if len(values) < 3:  # of two, nobody can say which is the slow one
            continue
        median = statistics.median(values.values())
        for host, value in values.items():
            if value < limits.of_median * median:
                faults[host].append(f"{name} {value:.3g} {unit}, where the median is {median:.3g}")
    return {host: found for host, found in faults.items() if found}


def _faults(check: NodeCheck, limits: Limits) -> list[str]:
    found = list(check.problems)
    count = len(check.gpus or ())
    if count < limits.gpus:
        found.append(f"{count} of {limits.gpus} GPUs" + (" (no nvidia-smi)" if check.gpus is None else ""))
    # Beside the others of its node, since nodes may have different GPUs.
    clocks = [gpu.max_clock_mhz for gpu in check.gpus or () if gpu.max_clock_mhz]
    for gpu in check.gpus or ():
        found += [f"GPU {gpu.index}: {fault}" for fault in _gpu_faults(gpu, limits, max(clocks, default=0.0))]
    if check.clock_offset is not None and abs(check.clock_offset) > limits.clock_seconds:
        found.append(f"clock off by {check.clock_offset:+.1f} s")
    return found


def _gpu_faults(gpu: Gpu, limits: Limits, fastest: float) -> list[str]:
    found = []
    if gpu.celsius is not None and gpu.celsius > limits.celsius:
        found.append(f"{gpu.celsius:.0f} °C before work")
    if gpu.used_mib is not None and gpu.used_mib > limits.idle_gib * 1024:
        found.append(f"{gpu.used_mib / 1024:.1f} GiB in use by nobody's job")
    if gpu.ecc_errors:
        found.append(f"{gpu.ecc_errors} uncorrected ECC errors")
    if gpu.slowed:
        found.append("slowed by hardware (heat or power)")
    if gpu.remap_pending:
        found.append("memory rows wait to be replaced: needs a reset")
    if gpu.max_clock_mhz is not None and gpu.max_clock_mhz < limits.of_median * fastest:
        found.append(f"its fastest clock is {gpu.max_clock_mhz:.0f} MHz, others' {fastest:.0f}")
    return found


def table(checks: Sequence[NodeCheck], faults: dict[str, list[str]]) -> str:
    """A line a node, bad ones first with their reasons. Plain text: the host's Python may have no packages."""
    nobody = NodeCheck(host="")
    by_host = {check.host: check for check in checks}
    rows = [["node", "GPUs", "hottest", "clock", *MEASURES, "verdict"]]
    for host in sorted({*by_host, *faults}, key=lambda name: (name not in faults, name)):
        check = by_host.get(host, nobody)
        heats = [gpu.celsius for gpu in check.gpus or () if gpu.celsius is not None]
        rows.append(
            [
                host,
                "none" if check.gpus is None else str(len(check.gpus)),
                f"{max(heats):.0f} °C" if heats else "-",
                "-" if check.clock_offset is None else f"{check.clock_offset:+.2f} s",
                *(_figure(measure(check), unit) for unit, measure in MEASURES.values()),
                "BAD: " + "; ".join(faults[host]) if host in faults else "good",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _figure(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}"
