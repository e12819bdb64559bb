"""Positions of tokens in their documents: xPos (A Length-Extrapolatable Transformer, arXiv 2212.10554), rotary embeddings
(RoFormer, arXiv 2104.09864) and sinusoids as the released KOSMOS models use them.

xPos, for head width K and pair i of K/2; rotary embeddings are the same with s = 1:

    theta_i = 10000^(-2i/K)          angle of position n: n theta_i
    zeta_i  = (2i/K + 0.4) / 1.4     decay of position n: s_i(n) = zeta_i^((n - c) / 512)
    q'_n = s(n) (q cos + rot(q) sin),   k'_m = s(m)^-1 (k cos + rot(k) sin),   rot(x0, x1, ...) = (-x1, x0, ...)

so that q'_n . k'_m depends on n - m alone. The centre c cancels; it keeps numbers in range. torchscale moves it with the
length of the sequence and must rotate cached keys anew at every step; here it is fixed, so cached keys stay valid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

THETA_BASE = 10_000.0
SCALE_BASE = 512.0
GAMMA = 0.4
FIRST_SINUSOID = 2
"""fairseq numbers positions from padding_idx + 1."""


class Rotation(NamedTuple):
    """Factors of queries and keys, each (B, T, 1, K): `q * cos_q + rotate_pairs(q) * sin_q`.

    `cis_q` and `cis_k` are the same as complex numbers (B, T, 1, K/2), cos + i sin for each pair x0 + i x1.
    """

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    cis_q: Tensor
    cis_k: Tensor


def xpos_tables(n_positions: int, head_dim: int) -> Tensor:
    """Return (4, n_positions, K) float32: cos_q, sin_q, cos_k, sin_k of every position, decay included."""
    n, pair, cos, sin = _angles(n_positions, head_dim)
    # Centred, so that neither the factor nor its inverse grows large within the table.
    decay = ((pair + GAMMA) / (1 + GAMMA)) ** ((n - n_positions // 2) / SCALE_BASE)
    tables = torch.stack([cos * decay, sin * decay, cos / decay, sin / decay])
    return tables.repeat_interleave(2, dim=-1).float()  # both elements of a pair have the same factors


def rotary_tables(n_positions: int, head_dim: int) -> Tensor:
    """Return (4, n_positions, K) float32 as `xpos_tables` does, without decay: queries and keys rotate alike."""
    *_, cos, sin = _angles(n_positions, head_dim)
    return torch.stack([cos, sin, cos, sin]).repeat_interleave(2, dim=-1).float()


def _angles(n_positions: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return n (n_positions, 1), 2i/K (K/2,), and cosine and sine of n theta_i, float64."""
    # float64: float32 would lose digits of n theta at large n; tables are rounded once.
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    n = torch.arange(n_positions, dtype=torch.float64)[:, None]
    angle = n * THETA_BASE**-pair
    return n, pair, angle.cos(), angle.sin()


def rotation(tables: Tensor, positions: Tensor) -> Rotation:
    """Return the rotation of (B, T) positions, which all layers of a step share."""
    values = tables[:, positions].unsqueeze(-2)  # (4, B, T, 1, K)
    cos_q, sin_q, cos_k, sin_k = values
    # Every second entry, as both of a pair are equal.
    cis_q, cis_k = (torch.complex(cos[..., ::2], sin[..., ::2]) for cos, sin in ((cos_q, sin_q), (cos_k, sin_k)))
    return Rotation(cos_q, sin_q, cos_k, sin_k, cis_q, cis_k)


def rotate_pairs(x: Tensor) -> Tensor:
    """Return (-x1, x0, -x3, x2, ...) along the last axis."""
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def rotate(q: Tensor, k: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys (B, T, H, K) in their dtype, computed in float32."""
    # Eagerly one complex product is fastest; inductor generates no code for complex numbers, but fuses the real formula.
    if torch.compiler.is_compiling():
        return rotate_real(q, k, by)
    return _rotate_complex(q, by.cis_q), _rotate_complex(k, by.cis_k)


def _rotate_complex(x: Tensor, cis: Tensor) -> Tensor:
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)))  # (B, T, H, K / 2)
    return torch.view_as_real(pairs * cis).flatten(-2).to(x.dtype)


def rotate_real(q: Tensor, k: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
    """Return what `rotate` does, by the formula in real numbers."""
    rotated_q = q.float() * by.cos_q + rotate_pairs(q).float() * by.sin_q
    rotated_k = k.float() * by.cos_k + rotate_pairs(k).float() * by.sin_k
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def sinusoids(n_positions: int, dim: int) -> Tensor:
    """Return (n_positions, D) float32 in fairseq's layout: sines in the first half, cosines in the second."""
    step = math.log(THETA_BASE) / (dim // 2 - 1)  # the last frequency is 1 / 10,000
    frequency = torch.exp(-step * torch.arange(dim // 2, dtype=torch.float64))
    angle = (torch.arange(n_positions, dtype=torch.float64)[:, None] + FIRST_SINUSOID) * frequency
    table = torch.zeros(n_positions, dim)
    # An odd width keeps a last column of zeros.
    table[:, : dim // 2 * 2] = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    return table
