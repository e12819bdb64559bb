"""Negative log-likelihood of the supervised positions.

    nll_s = log sum_v exp(z_sv) - z_s,t(s),   z = hidden head'          loss = sum_s w_s nll_s
    d loss / d z_sv = w_s (p_sv - [v = t(s)])

In training the weights w are known before the forward pass, so that a chunk's gradients are computed while its logits exist:
the vocabulary projection runs once, not again in the backward pass, and only one chunk of logits is held at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kosmos_lit.ops.graphs import Compiler

VOCAB_ALIGNMENT = 64
"""In 16 bits the output matrix is padded with zero rows to a multiple of this: GPUs use slow kernels for matrices whose rows
do not start at a multiple of 16 bytes, as rows of 64,007 logits do."""


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Return (S,) float32 negative log-likelihoods in nats of the supervised positions.

    Args:
        hidden: (S, D) decoder output at the supervised positions.
        head: (V, D) output matrix.
        targets: (S,) ids.
        chunk: most positions whose (chunk, V) logits are computed at once; None for all.
    """
    if chunk is None or len(hidden) <= chunk:
        return _nll(hidden, head, targets)
    pieces = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([_nll(h, head, t) for h, t in pieces])


def _nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")  # sums over V in float32


def weighted_nll(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | float,
    chunk: int | None = None,
    *,
    compiler: Compiler | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the () float32 sum of `weights * token_nll(...)`, and (S,) `token_nll(...)` without gradient.

    Args:
        hidden: (S, D) decoder output at the supervised positions.
        head: (V, D) output matrix; its gradient is accumulated in float32.
        targets: (S,) ids.
        weights: (S,) float32, or one number for all; without gradient.
        chunk: most positions whose (chunk, V) logits are held at once; None for all.
        compiler: fuses the elementwise operations on logits into one kernel instead of five; None: they run one by one.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head.requires_grad):
        nll = token_nll(hidden, head, targets, chunk)
        return (weights * nll).sum(), nll
    if isinstance(weights, float):
        weights = torch.full(targets.shape, weights, device=hidden.device)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    loss_and_nll: tuple[Tensor, Tensor] = _WeightedNll.apply(hidden, head, targets, weights, chunk, dtype, compiler)
    return loss_and_nll


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int | None,
        dtype: torch.dtype,
        compiler: Compiler | None,
    ) -> tuple[Tensor, Tensor]:
        S, V, chunk = len(hidden), len(head), chunk or max(1, len(hidden))
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        nll = hidden.new_empty(S, dtype=torch.float32)
        x, matrix = hidden.to(dtype), head.to(dtype)
        if (n_padding := -V % VOCAB_ALIGNMENT) and dtype.itemsize == 2:
            matrix = F.pad(matrix, (0, 0, 0, n_padding))
        d_head = torch.zeros_like(matrix, dtype=torch.float32) if wants_head else None
        for at in range(0, S, chunk):
            rows = slice(at, at + chunk)
            run = nll_and_gradient
            if compiler is not None and S - at > 1:  # torch.compile would make a graph for one row, apart from all others
                # None: it compiles for full chunks, then once more for any other number of rows, and keeps the vocabulary's
                # size a constant in both, which allows wide loads.
                run = compiler(nll_and_gradient, dynamic=None)
            logits = F.linear(x[rows], matrix)  # (chunk, padded V)
            # The matrix's zero rows get no probability, and so no gradient.
            logits[:, V:] = -torch.inf
            nll[rows], d_logits = run(logits, targets[rows, None], weights[rows, None])
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ matrix
            if d_head is not None:
                _add_product(d_head, d_logits.t(), x[rows])
        ctx.gradients = d_hidden, None if d_head is None else d_head[:V].to(head.dtype)
        ctx.mark_non_differentiable(nll)  # for logs only
        return (weights * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a first backward pass has consumed the loss's gradients; compute the loss again")
        (d_hidden, d_head), ctx.gradients = ctx.gradients, None
        # Linear in the loss's own gradient, which is a number; in place, as they are used once.
        gradients = [None if g is None else g.mul_(upstream) for g in (d_hidden, d_head)]
        return (*gradients, None, None, None, None, None)


def nll_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (S,) float32 nats, and (S, V) the gradient of their weighted sum in the logits' dtype.

    Targets and weights are (S, 1). Overwrites float32 logits.
    """
    x = logits.float()
    top = x.amax(-1, keepdim=True)  # subtracted, so that exp does not overflow
    of_target = x.gather(-1, targets)
    # float() returns float32 logits themselves, which may be overwritten.
    x = x.sub_(top).exp_() if x is logits else (x - top).exp()
    total = x.sum(-1, keepdim=True)
    nll = total.log() + top - of_target  # (S, 1)
    gradient = x.mul_(weights / total).to(logits.dtype)
    # w (p - 1) at the target, without the cancellation where p is nearly 1
    gradient.scatter_(-1, targets, (weights * torch.expm1(-nll)).to(logits.dtype))
    return nll.squeeze(-1), gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a float32 matrix, where the device supports it without rounding the product to 16 bits."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)  # CUDA alone returns float32 products of 16 bits
    else:
        total += a @ b
