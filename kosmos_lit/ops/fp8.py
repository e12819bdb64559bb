"""A linear map whose three matrix products are computed in 8 bits (FP8 Formats for Deep Learning, arXiv 2209.05433).

    y = x w'            x (M, K), w (N, K)
    dx = dy w
    dw = dy' x

A number in 8 bits is a fraction of a float32 scale, by one of two rules. Both scale by current, not delayed, maxima: the
largest element becomes the format's largest number.

    tensorwise    one scale a tensor; x, w in e4m3 (3 bits of mantissa, up to 448), dy in e5m2 (2 bits, up to 57,344)
    rowwise       one scale for each vector that a product sums over; everything in e4m3

              tensorwise      rowwise: a scale for
    y         x, w            each row of x, each row of w
    dx        dy, w           each row of dy, each column of w
    dw        dy, x           each column of dy, each column of x

With a scale of its own a small row or column keeps its bits beside a large one, so that gradients do not need e5m2's range
and have a bit of mantissa more; but each tensor is rounded twice. Sums are float32. Elements below 2^-18 (e4m3) or 2^-32
(e5m2) of the largest one that shares their scale become zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kosmos_lit.errors import UserError

MULTIPLE = 16
"""Rows and columns of an 8-bit matrix are multiples of this."""
MIN_CAPABILITY = (8, 9)
"""Oldest CUDA capability with 8-bit matrix products: Ada Lovelace and Hopper."""
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def check_fp8(device: torch.device, dtype: torch.dtype, widths: dict[str, int], row_len: int) -> None:
    """Make sure that a run can train in 8 bits.

    Args:
        device: of the run.
        dtype: compute dtype of its precision.
        widths: the matrices' sides by the names of their config fields.
        row_len: positions in a row.

    Raises: UserError naming the unmet requirement.
    """
    problem = ""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
        problem = f"needs a CUDA device of capability 8.9 or later (Ada Lovelace, Hopper), but the run's is {name}"
    elif dtype != torch.bfloat16:
        problem = f"goes with trainer.precision bf16-mixed, but the run computes in {str(dtype).removeprefix('torch.')}"
    elif uneven := [f"{name} {n}" for name, n in (*widths.items(), ("data.seq_len", row_len)) if n % MULTIPLE]:
        problem = f"needs multiples of {MULTIPLE}, but has {', '.join(uneven)}"
    if problem:
        raise UserError(f"decoder.fp8 {problem}; set it to none")


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None, *, rowwise: bool = False) -> Tensor:
    """Map (..., K) to (..., N) by a weight (N, K); rows of x, K and N are multiples of 16.

    The result has autocast's dtype, or x's own; gradients have their tensors' dtypes.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # The products take matrices: all axes but the last are one.
    out: Tensor = (_Rowwise if rowwise else _Tensorwise).apply(x.reshape(-1, x.shape[-1]), weight, dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.view(*x.shape[:-1], -1)


def to_fp8(x: Tensor, dtype: torch.dtype, *, rowwise: bool = False) -> tuple[Tensor, Tensor]:
    """Return a tensor in 8 bits, and the float32 scale that restores it by multiplication.

    The scale is (), or with `rowwise` (rows, 1) of a matrix (rows, columns).
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if rowwise else x.abs().amax()
    # Bounded below, as zeros would divide by 0.
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max
    # Clamped, as rounding may carry a quotient past the format's largest number.
    return (x / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), scale


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        (x8, of_x), (w8, of_w) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        ctx.dtypes = x.dtype, weight.dtype
        return _result(_product(x8, w8, of_x, of_w, dtype, fast=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, of_x, w8, of_w = ctx.saved_tensors
        dy8, of_dy = to_fp8(upstream, BACKWARD)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy8, w8.t(), of_dy, of_w, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = _product(dy8.t(), x8.t(), of_dy, of_x, ctx.dtypes[1])
        return dx, dw, None


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        # Columns are the rows of the transposed matrix. The weight itself is kept: as a parameter it is in memory anyway.
        (x8, of_x), (w8, of_w) = to_fp8(x, FORWARD, rowwise=True), to_fp8(weight, FORWARD, rowwise=True)
        ctx.save_for_backward(*to_fp8(x.t(), FORWARD, rowwise=True), weight)
        ctx.dtypes = x.dtype, weight.dtype
        return _result(_product(x8, w8, of_x, of_w, dtype, fast=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, of_x, weight = ctx.saved_tensors  # x by column: (K, M), (K, 1)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            (dy8, of_dy), (w8, of_w) = (to_fp8(t, FORWARD, rowwise=True) for t in (upstream, weight.t()))
            dx = _product(dy8, w8, of_dy, of_w, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dy8, of_dy = to_fp8(upstream.t(), FORWARD, rowwise=True)  # (N, M), (N, 1)
            dw = _product(dy8, x8, of_dy, of_x, ctx.dtypes[1])
        return dx, dw, None


def _product(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return a b', (M, N), of a (M, K) and b (N, K); `fast` accumulates in fewer bits, enough for a forward pass.

    Scales are (), or (M, 1) and (N, 1).
    """
    # With a scale a row, CUDA's product is in bfloat16 alone outside of capability 9.0; so are autocast's gradients.
    result = dtype if of_a.ndim == 0 else torch.bfloat16
    # 8-bit products take a row-major and a column-major factor, which `b.t()` is. A transposed factor is laid out anew: both
    # have the summed axis last.
    a, b = a.contiguous(), b.contiguous()
    return torch._scaled_mm(a, b.t(), of_a, of_b.t(), out_dtype=result, use_fast_accum=fast).to(dtype)


def _result(product: Tensor) -> Tensor:
    """Return a product as the result of an autograd function: a view, which costs nothing.

    8-bit numbers have no gradient of their own, so torch.compile of torch 2.11 takes what is computed from them for a
    constant, even as an autograd function's result, and makes every gradient before it zero. It does not if that is a view.
    """
    return product.view_as(product)
