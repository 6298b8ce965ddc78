"""Memory of one process on the CPU, from Linux."""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    return _field("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that it has held since `forget_peak`."""
    return _field("VmHWM")


def private_bytes() -> int | None:
    """What it holds now of memory that no file backs."""
    return _field("RssAnon")


def forget_peak() -> bool:
    """Count the peak anew from here; False where the system does not allow it."""
    try:
        # proc(5): 5 resets the peak, VmHWM, to what is resident now
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _field(name: str) -> int | None:
    if not STATUS.is_file():
        return None
    lines = [line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:")]
    return int(lines[0].split()[1]) * 1024 if lines else None
