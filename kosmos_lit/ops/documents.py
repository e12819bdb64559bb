"""Attention document by document: work and memory grow with the documents' lengths, not with the square of the row's.

Documents of similar length share a bucket, one a row, padded at the end. Causal attention needs no mask there: padding comes
after every real position, and the outputs at padding are dropped.
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

from kosmos_lit.ops.masks import DocumentMask, to_device

LENGTH_RATIO = 0.8
"""Shortest over longest length in a bucket: padding adds at most a quarter of the positions, a tenth on average."""
SHORT_LENGTH = 16
"""Documents up to this length share one bucket: another kernel call costs more than their padding."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """Index maps between the B * T positions of a micro-batch and the P positions of all buckets, one after the other."""

    sizes: tuple[tuple[int, int], ...]
    """Documents in each bucket, and their padded length."""
    to_bucket: Tensor | None
    """(R,) int64: bucket position of each of the R real positions, which are no row's padding; None: the identity, as
    the buckets hold the whole micro-batch in its order."""
    to_stream: Tensor | None
    """(P,) int64: stream position that each bucket position reads; arbitrary for padding."""
    real: Tensor | None
    """(R,) int64: the real positions in the stream; None: all of them."""


def plan_buckets(mask: DocumentMask) -> Buckets:
    """Return a micro-batch's buckets, planned on the host from the lengths alone."""
    spans = mask.spans
    members: list[list[tuple[int, int]]] = []  # spans of each bucket, longest first
    longest = 0
    for first, length in sorted(spans, key=lambda span: -span[1]):  # stable: equal lengths stay in order
        if not members or (length < LENGTH_RATIO * longest and longest > SHORT_LENGTH):
            members.append([])
            longest = length  # the bucket's padded length
        members[-1].append((first, length))
    sizes = [(len(bucket), bucket[0][1]) for bucket in members]
    n_positions, n_real = mask.n_rows * mask.row_len, sum(length for _, length in spans)
    # Documents of one length and no padding at all: the bucket is the micro-batch.
    if len(sizes) == 1 and sizes[0][0] * sizes[0][1] == n_positions == n_real:
        return Buckets(tuple(sizes), None, None, None)
    to_stream = np.zeros(sum(n * width for n, width in sizes), dtype=np.int64)  # padding reads position 0
    to_bucket = np.full(n_positions, -1, dtype=np.int64)  # -1: a row's padding
    at = 0
    for (_, width), bucket in zip(sizes, members, strict=True):
        for first, length in bucket:
            to_stream[at : at + length] = np.arange(first, first + length)
            to_bucket[first : first + length] = np.arange(at, at + length)
            at += width
    real = np.flatnonzero(to_bucket >= 0)
    indexes = [to_device(index, torch.int64, mask.device) for index in (to_bucket[real], to_stream, real)]
    return Buckets(tuple(sizes), indexes[0], indexes[1], None if n_real == n_positions else indexes[2])


def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Return causal attention within documents, (B, T, H, K); zero at the rows' padding, as far as the mask holds it."""
    plan = mask.cached_form(plan_buckets)
    B, T, H, K = q.shape
    # Heads stay together: one index moves a whole position.
    flat = [x.reshape(B * T, H * K) for x in (q, k, v)]
    padded = [_Pad.apply(x, plan) for x in flat]  # (P, H * K) each
    widths = [n * width for n, width in plan.sizes]
    outs = []
    for (n, width), *qkv in zip(plan.sizes, *(x.split(widths) for x in padded), strict=True):
        query, key, value = (x.view(n, width, H, K).transpose(1, 2) for x in qkv)  # (n, H, width, K)
        outs.append(_causal(query, key, value, dropout).transpose(1, 2).reshape(n * width, H * K))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs or padded)  # without documents `outs` is empty
    return _Unpad.apply(joined, plan, B * T).view(B, T, H, K)  # type: ignore[no-any-return]


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    with disable_cudnn_attention():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


@contextmanager
def disable_cudnn_attention() -> Iterator[None]:
    """Exclude cuDNN from scaled_dot_product_attention, for shapes that change from call to call.

    PyTorch prefers cuDNN on Hopper, which compiles a plan for each new shape; buckets of documents, the images of a
    micro-batch and a growing KV cache hardly ever repeat one.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _Pad(torch.autograd.Function):
    """(B * T, W) -> (P, W). Values at padding reach no real output, so they get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets) -> Tensor:
        ctx.plan, ctx.n_positions = plan, len(x)
        return x.view_as(x) if plan.to_stream is None else x.index_select(0, plan.to_stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each real position has one bucket position, so nothing adds up as in index_select's own backward.
        return _gather_real(gradient, ctx.plan, ctx.n_positions), None


class _Unpad(torch.autograd.Function):
    """(P, W) -> (B * T, W), the inverse; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets, n_positions: int) -> Tensor:
        ctx.plan, ctx.n_bucket_positions = plan, len(x)
        return _gather_real(x, plan, n_positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        plan: Buckets = ctx.plan
        if plan.to_bucket is None:
            return gradient, None, None
        of_real = gradient if plan.real is None else gradient.index_select(0, plan.real)
        in_buckets = gradient.new_zeros(ctx.n_bucket_positions, gradient.shape[1])
        return in_buckets.index_put_((plan.to_bucket,), of_real), None, None


def _gather_real(x: Tensor, plan: Buckets, n_positions: int) -> Tensor:
    """Return (B * T, W): the value of each real position, zero at the rows' padding."""
    if plan.to_bucket is None:
        return x.view_as(x)
    values = x.index_select(0, plan.to_bucket)
    return values if plan.real is None else x.new_zeros(n_positions, x.shape[1]).index_put_((plan.real,), values)
