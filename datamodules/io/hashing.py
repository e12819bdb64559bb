"""Hashes and draws that depend on their inputs alone, not on the version of a library's random generator."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1


def hash_bytes(data: bytes) -> int:
    """Return a 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_key(*parts: int | str) -> int:
    """Return a 64-bit key for a purpose, from its name and its inputs."""
    return hash_bytes("\0".join(map(str, parts)).encode())


def hash_numbers(numbers: npt.ArrayLike, key: int) -> U64:
    """Return one 64-bit hash per number under `key` (the finaliser of splitmix64)."""
    x = np.asarray(numbers).astype(np.uint64)
    # Products wrap around modulo 2 ** 64, as intended.
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key & _MASK)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(n: int, key: int) -> npt.NDArray[np.int64]:
    """Return a permutation of 0 .. n-1 drawn by `key`."""
    return np.argsort(hash_numbers(np.arange(n), key), kind="stable")


def share_of(key: int) -> float:
    """Map a 64-bit hash to [0, 1), for a draw with a probability."""
    # A double holds 53 bits exactly; all 64 could round up to 1.
    return (key >> 11) / 2.0**53
