"""Attention document by document: work and memory follow the documents' lengths, not the square of the row's.

Documents of like length share a bucket and stand in it one a row, padded at the end. There causal attention needs no
mask: padding comes after everything that could see it, and what it sees itself is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kosmos_lit.ops.masks import DocumentMask, on_device

LIKE = 0.8
"""Least length in a bucket, as a share of the longest one's: at most a quarter more positions, a tenth in the mean."""
SHORT = 16
"""Documents up to here share a bucket whatever their lengths: a further call costs more than their padding."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """Where each position of a micro-batch stands among the padded documents."""

    sizes: tuple[tuple[int, int], ...]
    """Documents in each bucket, and positions of each of them with padding."""
    place: Tensor | None
    """(R,) int64: place in the joined buckets of each of the R positions that are no row's padding; None: they stand there
    in order and nothing else does, so that nothing has to be moved."""
    source: Tensor | None
    """(P,) int64: the stream's position that each of the P places takes; a place of padding takes any."""
    real: Tensor | None
    """(R,) int64: those positions in the stream; None: all of them."""


def buckets(mask: DocumentMask) -> Buckets:
    """Plan a micro-batch's buckets, on the host, from the lengths alone."""
    spans = mask.spans
    members: list[list[tuple[int, int]]] = []
    longest = 0
    for first, length in sorted(spans, key=lambda span: -span[1]):  # stable: like documents stay in the stream's order
        if not members or (length < LIKE * longest and longest > SHORT):
            members.append([])
            longest = length
        members[-1].append((first, length))
    sizes = [(len(inside), inside[0][1]) for inside in members]
    n_positions, n_real = mask.n_rows * mask.row_len, sum(length for _, length in spans)
    if len(sizes) == 1 and sizes[0][0] * sizes[0][1] == n_positions == n_real:
        return Buckets(tuple(sizes), None, None, None)
    source = np.zeros(sum(n * width for n, width in sizes), dtype=np.int64)
    place = np.full(n_positions, -1, dtype=np.int64)
    at = 0
    for (_, width), inside in zip(sizes, members, strict=True):
        for first, length in inside:
            source[at : at + length] = np.arange(first, first + length)
            place[first : first + length] = np.arange(at, at + length)
            at += width
    real = np.flatnonzero(place >= 0)
    found = [on_device(index, torch.int64, mask.device) for index in (place[real], source, real)]
    return Buckets(tuple(sizes), found[0], found[1], None if n_real == n_positions else found[2])


def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Return what each position's document gives it, (B, T, H, K); zero at the rows' padding that the mask knows of."""
    plan = mask.form(buckets)
    B, T, H, K = q.shape
    flat = [x.reshape(B * T, H * K) for x in (q, k, v)]
    padded = [_Pad.apply(x, plan) for x in flat]
    widths = [n * width for n, width in plan.sizes]
    outs = []
    for (n, width), *qkv in zip(plan.sizes, *(x.split(widths) for x in padded), strict=True):
        query, key, value = (x.view(n, width, H, K).transpose(1, 2) for x in qkv)  # (n, H, width, K)
        outs.append(_causal(query, key, value, dropout).transpose(1, 2).reshape(n * width, H * K))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs or padded)  # no document at all: three times nothing
    return _Unpad.apply(joined, plan, B * T).view(B, T, H, K)  # type: ignore[no-any-return]


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    with without_cudnn():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep scaled_dot_product_attention from cuDNN, which PyTorch prefers on Hopper: it compiles a plan for each new shape.

    Buckets of documents, a micro-batch's images and a growing cache hardly ever have the same one twice.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _Pad(torch.autograd.Function):
    """(B * T, W) -> (P, W). What stands on padding reaches no position that counts, so no gradient comes back from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets) -> Tensor:
        ctx.plan, ctx.n_positions = plan, len(x)
        return x.view_as(x) if plan.source is None else x.index_select(0, plan.source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _back(gradient, ctx.plan, ctx.n_positions), None


class _Unpad(torch.autograd.Function):
    """(P, W) -> (B * T, W), the other way round; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets, n_positions: int) -> Tensor:
        ctx.plan, ctx.n_places = plan, len(x)
        return _back(x, plan, n_positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        plan: Buckets = ctx.plan
        if plan.place is None:
            return gradient, None, None
        counts = gradient if plan.real is None else gradient.index_select(0, plan.real)
        places = gradient.new_zeros(ctx.n_places, gradient.shape[1])
        return places.index_put_((plan.place,), counts), None, None


def _back(x: Tensor, plan: Buckets, n_positions: int) -> Tensor:
    """Return (B * T, W): what stands at each position's place, zero for the rows' padding."""
    if plan.place is None:
        return x.view_as(x)
    found = x.index_select(0, plan.place)
    return found if plan.real is None else x.new_zeros(n_positions, x.shape[1]).index_put_((plan.real,), found)
