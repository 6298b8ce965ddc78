"""Lengths of time as people and SLURM write them."""

import re

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_WITH_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d{1,4}):([0-5]?\d):([0-5]?\d)")


def parse_duration(text: str | float, key: str) -> float:
    """Seconds, from `3h50m`, `230m`, `90s`, `1d12h`, `23:50:00`, SLURM's `2-00:00:00`, or a number of seconds.

    Two numbers with a colon are refused: SLURM reads them as minutes and seconds, most people as hours and minutes.

    Raises:
        ValueError: anything else, or nothing; names `key`.
    """
    # YAML may have read 90 as a number.
    compact = "".join(str(text).lower().split())
    match = _WITH_UNITS.fullmatch(compact) or _CLOCK.fullmatch(compact)
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        seconds = float(compact)
    elif compact and match:
        seconds = float(sum(int(n or 0) * unit for n, unit in zip(match.groups(), UNITS.values(), strict=True)))
    else:
        raise ValueError(
            f"{key}: {text!r} is no length of time; write it like 3h50m, 230m, 2-00:00:00 or 13800 (seconds)"
        )
    if seconds <= 0:
        raise ValueError(f"{key}: {text!r} must be longer than 0")
    return seconds
