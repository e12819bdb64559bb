"""Weights, latents and tokens that torchscale's environment and ours both compute, so that no golden file stores them.

The top 24 of PCG64's 64 bits are a uniform number in [-1, 1) that float32 holds exactly. numpy promises these bits for
good, and only elementwise float32 products follow, so every version and machine gets the same weights bit for bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np


def bits(name: str, n: int) -> np.ndarray:
    """Return n uint64 that depend on the name only."""
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(n)


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return float32 in [-1, 1)."""
    top = (bits(name, math.prod(shape)) >> np.uint64(40)).astype(np.float32)
    return (top / np.float32(2**23) - np.float32(1)).reshape(shape)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return a parameter by its name in torchscale, none of it neutral: LayerNorms off 1, biases off 0, sharp attention."""
    drawn = uniform(name, shape)
    if len(shape) == 1:
        norm = name.endswith(("norm.weight", "_ln.weight"))
        return np.float32(1) + np.float32(0.4) * drawn if norm else np.float32(0.3) * drawn
    spread = math.sqrt(3) if name.startswith("embed_") else 2.0  # embeddings: standard deviation D^-0.5
    return np.float32(spread / math.sqrt(shape[1])) * drawn


def latents(case: str, shape: Sequence[int]) -> np.ndarray:
    """Return image latents (N, L, D) of the embeddings' scale."""
    return np.float32(math.sqrt(3 / shape[-1])) * uniform(f"{case} latents", shape)


def tokens(case: str, n_rows: int, n_positions: int, vocab_size: int) -> np.ndarray:
    """Return ids (B, T), int64."""
    drawn = bits(f"{case} tokens", n_rows * n_positions) >> np.uint64(11)
    return (drawn % np.uint64(vocab_size)).astype(np.int64).reshape(n_rows, n_positions)
