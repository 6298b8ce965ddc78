"""Random generators as a function of seed, purpose and number."""

import hashlib

import torch


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of the CPU for one purpose (such as "epoch") and its number.

    torch's generator looks at 32 bits of its seed only, so they are those of a hash of all three.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
