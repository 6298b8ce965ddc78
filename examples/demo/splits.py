"""What is held out: a pure function of names, so that it never depends on order, process or machine."""

import hashlib


def stable_fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but `parts`, uniform over different parts."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_held_out(fraction: float, *parts: str) -> bool:
    """Whether the thing named by `parts` belongs to the held-out `fraction`."""
    return stable_fraction(*parts) < fraction
