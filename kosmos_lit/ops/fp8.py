"""A linear map whose three matrix products are computed in 8 bits (FP8 Formats for Deep Learning, arXiv 2209.05433).

    y = x w'            x, w in e4m3: 3 bits of mantissa, up to 448
    dx = dy w           dy in e5m2: 2 bits of mantissa, up to 57,344
    dw = dy' x

Each tensor is scaled as a whole so that its largest element becomes the format's largest number: scaling by current, not
delayed, maxima. Sums are float32. Elements below 2^-18 (e4m3) or 2^-32 (e5m2) of the largest one become zero.
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
        raise UserError(f"decoder.fp8 {problem}; set it to false")


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., K) to (..., N) by a weight (N, K); rows of x, K and N are multiples of 16.

    The result has autocast's dtype, or x's own; gradients have their tensors' dtypes.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # The products take matrices: all axes but the last are one.
    out: Tensor = _LinearFp8.apply(x.reshape(-1, x.shape[-1]), weight, dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.view(*x.shape[:-1], -1)


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a tensor in 8 bits, and the () float32 scale that restores it by multiplication."""
    x = x.float()
    # Bounded below, as a tensor of zeros would divide by 0.
    scale = x.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max
    # Clamped, as rounding may carry a quotient past the format's largest number.
    return (x / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), scale


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        (x8, of_x), (w8, of_w) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, w8, of_x, of_w, dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, of_x, w8, of_w = ctx.saved_tensors
        dy8, of_dy = to_fp8(upstream, BACKWARD)
        dx = dw = None
        # Factors in the layout that `_product` takes: both with the summed axis last.
        if ctx.needs_input_grad[0]:
            dx = _product(dy8, w8.t().contiguous(), of_dy, of_w, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = _product(dy8.t().contiguous(), x8.t().contiguous(), of_dy, of_x, ctx.dtypes[1])
        return dx, dw, None


def _product(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return a b', (M, N), of a (M, K) and b (N, K); `fast` accumulates in fewer bits, enough for a forward pass."""
    # 8-bit products take a row-major and a column-major factor, which `b.t()` is.
    return torch._scaled_mm(a, b.t(), of_a, of_b, out_dtype=dtype, use_fast_accum=fast)
