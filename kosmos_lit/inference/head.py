"""From hidden states to the next token: the largest matrix of a decoding step, and how to read less of it.

Greedy decoding needs the likeliest token only. On a CPU a step waits for memory, and V x D weights in 8 bits are a quarter
of the bytes. With x = x8 + ex and w_v = w8_v + ew_v, 8-bit vectors and what they leave out,

    |x . w_v - x8 . w8_v|  =  |x . ew_v + ex . w8_v|  <=  |x| |ew_v| + |ex| |w8_v|        (Cauchy-Schwarz)

The sum over 8-bit products is exact integer arithmetic, so the bound is a true one: a token whose upper bound lies below
another's lower bound cannot win. The few that remain are compared in float32, and the winner is that of the full product.

A beam search needs every logit. There the matrix is read in slices that stay in the CPU's cache: for a handful of rows,
matrix libraries read a large matrix several times.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from kosmos_lit.decoder import Decoder
from kosmos_lit.errors import UserError

LEAST_WEIGHTS = 1 << 22
"""A smaller V x D stays in the CPU's cache; nothing is gained there."""
SLACK = 1e-5
"""Added to both lengths, relative to a row's: float32 rounding of scales, norms and products, some 1e-7."""
SLICE_WEIGHTS = 1 << 18
"""Weights in a slice of the matrix: 1 MiB."""
CHECKED = 32
"""Columns that are summed up to notice changed weights."""
FEW_ROWS = range(4, 13)
"""Numbers of rows for which slices were the faster way, 1.3 to 2.4 times (MKL, one thread, V 65,037, D 512)."""


class Screen(NamedTuple):
    """The output matrix in 8 bits, one scale a row."""

    rows: Tensor
    """(V, D) int8."""
    scales: Tensor
    """(V,) float32: row v stands for `scales[v] * rows[v]`."""
    errors: Tensor
    """(V,) |ew_v|: length of what row v leaves out."""
    norms: Tensor
    """(V,) |w8_v|: length of the row that it stands for."""

    @classmethod
    def of(cls, weight: Tensor) -> Screen:
        """Round a (V, D) float32 matrix."""
        parts = []
        for w in _slices(weight.detach()):
            scale = w.abs().amax(1).clamp(min=1e-20) / 127
            rows = (w / scale[:, None]).round_()
            stood_for = rows * scale[:, None]
            off, length = (w - stood_for).norm(dim=1), stood_for.norm(dim=1)
            parts.append((rows.to(torch.int8), scale, off + SLACK * length, length * (1 + SLACK)))
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return approximate logits (B, V) of hidden states (B, D); and the two lengths (B, 1) that `off` takes."""
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127  # (B, 1)
        x8 = (x / scale).round_()
        about = torch._int_mm(x8.to(torch.int8), self.rows.t()).float().mul_(self.scales).mul_(scale)
        return about, x.norm(dim=1, keepdim=True), (x - x8 * scale).norm(dim=1, keepdim=True)


class Head:
    """The tied output matrix of a decoder."""

    def __init__(self, decoder: Decoder, forbidden: Tensor) -> None:
        """Take the (n,) ids that `likeliest` passes over."""
        self._decoder, self._forbidden = decoder, forbidden
        self.vocab_size = decoder.embed_tokens.num_embeddings

    @cached_property
    def _screen(self) -> Screen | None:
        return _screen_of(self._decoder)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (B, D) to (B, V) in float32."""
        weight = self._decoder.embed_tokens.weight
        if _is_large(weight) and len(hidden) in FEW_ROWS:
            return torch.cat([F.linear(hidden, part) for part in _slices(weight)], dim=1)
        return self._decoder.logits(hidden).float()

    def likeliest(self, hidden: Tensor) -> Tensor:
        """Return the id (B,) of the highest allowed logit after each of (B, D)."""
        if self._screen is not None:
            return self._screened(hidden, self._screen)
        logits = self.logits(hidden)
        logits[:, self._forbidden] = float("-inf")
        return logits.argmax(-1)

    def _screened(self, hidden: Tensor, screen: Screen) -> Tensor:
        V, weight = len(screen.rows), self._decoder.embed_tokens.weight
        about, length, left_out = screen.bounds(hidden)
        about[:, self._forbidden] = float("-inf")
        most = length * screen.errors.amax() + left_out * screen.norms.amax()  # (B, 1): no logit is further off
        row, ids = (about >= about.amax(1, keepdim=True) - 2 * most).nonzero(as_tuple=True)  # by row, then by id
        # The few that remain once more, each with its own bound.
        off = length[row, 0] * screen.errors[ids] + left_out[row, 0] * screen.norms[ids]
        about = about[row, ids]
        keep = about + off >= _highest(about - off, row, len(hidden))[row]
        row, ids = row[keep], ids[keep]
        exact = (weight[ids] * hidden[row]).sum(-1)
        first = torch.where(exact == _highest(exact, row, len(hidden))[row], ids, V)  # of equals the first, like argmax
        best = ids.new_full((len(hidden),), V).scatter_reduce(0, row, first, "amin")
        if bool((best == V).any()):
            raise UserError("the model's output is not finite: its weights, or what it reads, hold NaN or infinity")
        return best


def _highest(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Return (B,) the highest of the values of each row."""
    return values.new_full((n_rows,), float("-inf")).scatter_reduce(0, row, values, "amax")


def _is_large(weight: Tensor) -> bool:
    """Return whether a matrix is in float32 on a CPU and too large for its cache."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _slices(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, SLICE_WEIGHTS // weight.shape[1]))


_screens: WeakKeyDictionary[Decoder, tuple[tuple[int, int, float], Screen]] = WeakKeyDictionary()


def _screen_of(decoder: Decoder) -> Screen | None:
    """Return the screen of a decoder's present weights, kept between calls; None where it would not pay.

    It pays on CPUs that multiply 8-bit integers in one instruction; among x86 ones that goes with AVX-512.
    """
    weight = decoder.embed_tokens.weight
    if not _is_large(weight) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    # A sum in which each row counts differently notices rows that were written past autograd's version counter.
    version = 0 if weight.is_inference() else weight._version
    sums = weight.detach()[:, :CHECKED].sum(1)
    state = (weight.data_ptr(), version, float(sums @ torch.linspace(1.0, 2.0, len(sums))))
    kept = _screens.get(decoder)
    if kept is None or kept[0] != state:
        kept = _screens[decoder] = (state, Screen.of(weight))
    return kept[1]
