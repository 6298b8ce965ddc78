"""What `nvidia-smi` says of a node's GPUs.

Fields as documented by `nvidia-smi --help-query-gpu`. A field that a GPU does not have is answered `[N/A]` or
`[Not Supported]`, and is None here; a field that the driver does not know fails the whole query, so the few that came
late or were renamed are asked for by themselves.
"""

import csv
import subprocess
from dataclasses import dataclass

FIELDS = (
    "index", "name", "temperature.gpu", "memory.used", "memory.total", "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
LATE_FIELDS = {
    "slowed": ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown"),
    "remap_pending": ("remapped_rows.pending",),
}
"""What each is called, the newest name first."""
ABSENT = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU; None where it does not say."""

    index: int
    """nvidia-smi's number of it on this node."""
    name: str
    celsius: float | None
    used_mib: float | None
    """Memory that processes hold now."""
    total_mib: float | None
    max_clock_mhz: float | None
    """The highest that its multiprocessors may have."""
    ecc_errors: int | None
    """Uncorrected, since the driver was loaded."""
    slowed: bool | None = None
    """By hardware: heat or power."""
    remap_pending: bool | None = None
    """Whether memory rows wait to be replaced at the next reset."""


def query_gpus() -> list[Gpu] | None:
    """The GPUs of this machine, or None where there is no nvidia-smi.

    Raises:
        RuntimeError: nvidia-smi is there and fails; with its own words.
    """
    try:
        gpus = parse_gpus(_ask(",".join(FIELDS)))
    except FileNotFoundError:
        return None
    late = {name: _first_known(names, len(gpus)) for name, names in LATE_FIELDS.items()}
    return [
        Gpu(**{**_fields(gpu), **{name: values[number] for name, values in late.items()}})
        for number, gpu in enumerate(gpus)
    ]


def parse_gpus(text: str) -> list[Gpu]:
    """Read the output of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`.

    Raises:
        RuntimeError: it is something else, such as a message of the driver.
    """
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row:
            continue
        if len(row) != len(FIELDS) or not row[0].isdigit():
            raise RuntimeError(f"nvidia-smi: {', '.join(row)}")
        index, name, celsius, used, total, clock, ecc = (value.strip() for value in row)
        errors = _number(ecc)
        gpus.append(
            Gpu(
                index=int(index), name=name, celsius=_number(celsius), used_mib=_number(used), total_mib=_number(total),
                max_clock_mhz=_number(clock), ecc_errors=None if errors is None else int(errors),
            )
        )  # fmt: skip
    return gpus


def parse_flags(text: str) -> list[bool | None]:
    """Read a column of `Active`, `Not Active`, `Yes`, `No`, `1`, `0`."""
    meaning = {"active": True, "yes": True, "1": True, "not active": False, "no": False, "0": False}
    return [meaning.get(line.strip().lower()) for line in text.splitlines() if line.strip()]


def _first_known(names: tuple[str, ...], count: int) -> list[bool | None]:
    for name in names:
        try:
            flags = parse_flags(_ask(name))
        except RuntimeError:
            continue
        if len(flags) == count:
            return flags
    return [None] * count


def _ask(fields: str) -> str:
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:  # a driver that hangs is a finding of this node, not the end of its check
        raise RuntimeError("nvidia-smi: no answer within 60 s; the driver hangs") from None
    if done.returncode:
        raise RuntimeError(f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())}")
    return done.stdout


def _number(text: str) -> float | None:
    return None if text in ABSENT else float(text)


def _fields(gpu: Gpu) -> dict:
    return {name: getattr(gpu, name) for name in gpu.__slots__}
