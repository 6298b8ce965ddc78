"""Orders that a key chooses and that need no memory; the same on every machine and with every version of numpy."""

import hashlib
import json

import numpy as np

ROUNDS = 6
"""Of the Feistel network."""
_BITS = (1 << 64) - 1


class KeyedPermutation:
    """A permutation of range(size) that `key` chooses, and its inverse, in constant memory.

    A Feistel network over the next even number of bits, walked until it falls below `size`.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        # halves of equal width, which a Feistel network needs; so its range is at most four times `size`
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [mix(key + turn) for turn in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Where `index` goes."""
        half, mask = self._half, self._mask
        # ends, because the network permutes: its walk comes back below size at the latest where it began
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                left, right = right, left ^ (mix(right ^ key) & mask)
            index = left << half | right
            if index < self.size:
                return index

    def index(self, value: int) -> int:
        """What goes to `value`."""
        half, mask = self._half, self._mask
        while True:
            left, right = value >> half, value & mask
            for key in reversed(self._keys):
                left, right = right ^ (mix(left ^ key) & mask), left
            value = left << half | right
            if value < self.size:
                return value


def mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, 2014): 64 bits to 64 bits that look independent."""
    value = (value + 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)


def random_bits(key: int, count: int) -> np.ndarray:
    """`count` numbers that look independent, uint64 [count]: `mix` of a counter."""
    value = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix(key))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def shuffled(key: int, count: int) -> np.ndarray:
    """A permutation of range(count) in memory, int64 [count]; much faster than `KeyedPermutation` for all of it."""
    # not numpy's generators: their streams may change between versions
    return np.argsort(random_bits(key, count), kind="stable")


def hash_of(*parts: int | str) -> int:
    """A 64-bit key from numbers and names."""
    # JSON keeps parts apart: ("a", "bc") and ("ab", "c") are other keys
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")
