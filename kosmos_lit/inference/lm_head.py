"""The language-model head: logits or the likeliest token after hidden states, the largest matrix of a decoding step.

Greedy decoding needs the likeliest token only. On a CPU a step waits for memory, and V x D weights in 8 bits are a quarter
of the bytes. With x = x8 + ex and w_v = w8_v + ew_v, 8-bit vectors and their rounding errors,

    |x . w_v - x8 . w8_v|  =  |x . ew_v + ex . w8_v|  <=  |x| |ew_v| + |ex| |w8_v|        (Cauchy-Schwarz)

The sum over 8-bit products is exact integer arithmetic, so the bound is a true one: a token whose upper bound lies below
another's lower bound cannot win. The few that remain are compared in float32, and the winner is that of the full product.

A beam search needs every logit. It reads the matrix in slices that stay in the CPU's cache: for a handful of rows, matrix
libraries read a large matrix several times.
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

MIN_WEIGHTS = 1 << 22
"""A smaller V x D stays in the CPU's cache, where nothing is gained."""
SLACK = 1e-5
"""Added to both lengths, relative to a row's: float32 rounding of scales, norms and products, some 1e-7."""
SLICE_WEIGHTS = 1 << 18
"""Weights in a slice of the matrix: 1 MiB."""
CHECKED_COLUMNS = 32
"""Columns that are summed up to notice changed weights."""
SLICED_ROWS = range(4, 13)
"""Numbers of rows for which slices were faster, 1.3 to 2.4 times (MKL, one thread, V 65,037, D 512)."""


class Int8Weights(NamedTuple):
    """The output matrix in 8 bits, one scale a row."""

    rows: Tensor
    """(V, D) int8."""
    scales: Tensor
    """(V,) float32: row v stands for `scales[v] * rows[v]`."""
    errors: Tensor
    """(V,) |ew_v|: length of the rounding error of row v."""
    norms: Tensor
    """(V,) |w8_v|: length of the rounded row v."""

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weights:
        """Round a (V, D) float32 matrix."""
        parts = []
        for w in _slices(weight.detach()):
            # 127 is int8's largest; a row of zeros, as that of <pad> is at first, must not be divided by 0.
            scale = w.abs().amax(1).clamp(min=1e-20) / 127
            rows = (w / scale[:, None]).round_()
            rounded = rows * scale[:, None]
            error, norm = (w - rounded).norm(dim=1), rounded.norm(dim=1)
            parts.append((rows.to(torch.int8), scale, error + SLACK * norm, norm * (1 + SLACK)))
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def approximate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return approximate logits (B, V) of hidden states (B, D), and |x| and |ex| (B, 1) for their error bound."""
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127  # (B, 1)
        x8 = (x / scale).round_()
        # Sums in int32 are exact while 127 * 127 * D is below 2 ** 31: for any D up to 133,000.
        logits = torch._int_mm(x8.to(torch.int8), self.rows.t()).float().mul_(self.scales).mul_(scale)
        return logits, x.norm(dim=1, keepdim=True), (x - x8 * scale).norm(dim=1, keepdim=True)


class LMHead:
    """The tied output matrix of a decoder."""

    def __init__(self, decoder: Decoder, forbidden: Tensor) -> None:
        """Take the decoder, and the (n,) ids that `greedy` never returns."""
        self._decoder, self._forbidden = decoder, forbidden
        self.vocab_size = decoder.embed_tokens.num_embeddings

    @cached_property
    def _int8_weights(self) -> Int8Weights | None:
        return _int8_weights_of(self._decoder)  # once a head: weights stay while it is used

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (B, D) to (B, V) in float32."""
        weight = self._decoder.embed_tokens.weight
        if _is_large(weight) and len(hidden) in SLICED_ROWS:
            return torch.cat([F.linear(hidden, part) for part in _slices(weight)], dim=1)
        return self._decoder.logits(hidden).float()

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the id (B,) of the highest allowed logit after each of (B, D)."""
        if self._int8_weights is not None:
            return self._greedy_by_bounds(hidden, self._int8_weights)
        logits = self.logits(hidden)
        logits[:, self._forbidden] = float("-inf")
        return logits.argmax(-1)

    def _greedy_by_bounds(self, hidden: Tensor, int8: Int8Weights) -> Tensor:
        V, weight = len(int8.rows), self._decoder.embed_tokens.weight
        approximate, norm, error = int8.approximate(hidden)
        approximate[:, self._forbidden] = float("-inf")
        bound = norm * int8.errors.amax() + error * int8.norms.amax()  # (B, 1): holds for every token of a row
        # Candidates by row, then by id.
        # Twice the bound: both the token and the best one may be off by one.
        row, ids = (approximate >= approximate.amax(1, keepdim=True) - 2 * bound).nonzero(as_tuple=True)
        # The few that remain once more, each with its own bound.
        own_bound = norm[row, 0] * int8.errors[ids] + error[row, 0] * int8.norms[ids]
        approximate = approximate[row, ids]
        keep = approximate + own_bound >= _row_max(approximate - own_bound, row, len(hidden))[row]
        row, ids = row[keep], ids[keep]
        exact = (weight[ids] * hidden[row]).sum(-1)
        first = torch.where(exact == _row_max(exact, row, len(hidden))[row], ids, V)  # of equals the first, like argmax
        best = ids.new_full((len(hidden),), V).scatter_reduce(0, row, first, "amin")
        if bool((best == V).any()):  # NaN is never the maximum, so a row with one keeps no candidate
            raise UserError("the model's output is not finite: its weights, or what it reads, hold NaN or infinity")
        return best


def _row_max(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Return (B,) the highest of the values of each row."""
    return values.new_full((n_rows,), float("-inf")).scatter_reduce(0, row, values, "amax")


def _is_large(weight: Tensor) -> bool:
    """Return whether a matrix is in float32 on a CPU and too large for its cache."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= MIN_WEIGHTS


def _slices(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, SLICE_WEIGHTS // weight.shape[1]))


# Weak: an entry goes when its decoder does.
_int8_cache: WeakKeyDictionary[Decoder, tuple[tuple[int, int, float], Int8Weights]] = WeakKeyDictionary()


def _int8_weights_of(decoder: Decoder) -> Int8Weights | None:
    """Return the 8-bit form of a decoder's present weights, cached between calls; None where it would not pay.

    It pays on CPUs that multiply 8-bit integers in one instruction; among x86 ones that goes with AVX-512.
    """
    weight = decoder.embed_tokens.weight
    if not _is_large(weight) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    version = 0 if weight.is_inference() else weight._version  # tensors of inference mode have no counter
    # Rows that were written past autograd's version counter show in a sum that weighs each row differently.
    sums = weight.detach()[:, :CHECKED_COLUMNS].sum(1)
    state = (weight.data_ptr(), version, float(sums @ torch.linspace(1.0, 2.0, len(sums))))
    cached = _int8_cache.get(decoder)
    if cached is None or cached[0] != state:
        cached = _int8_cache[decoder] = (state, Int8Weights.of(weight))
    return cached[1]
