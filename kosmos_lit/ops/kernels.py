"""Attention kernels for documents on GPUs, and their requirements. The only importer of xformers, lazily.

| kernel    | device | dtypes                  | head width                        | dropout on the weights |
|-----------|--------|-------------------------|-----------------------------------|------------------------|
| xformers  | CUDA   | float32, 16-bit         | multiple of 4 (float32) or 8      | yes                    |
| flex      | CUDA   | float32, 16-bit         | at least 16 (Triton's dot)        | no                     |
| sdpa      | any    | any                     | any                               | yes                    |
| reference | any    | any                     | any                               | yes                    |

xformers runs torch's own FlashAttention-2 and CUTLASS kernels. On CUDA in 16 bits `sdpa` is torch's FlashAttention over the
whole stream where that supports the head width and there is no dropout; otherwise it runs document by document, as on CPU
(`ops.documents`).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.ops.masks import DocumentMask, to_device

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_DIM = 256
"""Widest head of FlashAttention-2."""
AMPERE = (8, 0)
"""Oldest CUDA capability of FlashAttention-2."""
TRITON_MIN_HEAD_DIM = 16
"""Narrowest head of FlexAttention."""


def resolve_kernel(kernel: str, device: str) -> str:
    """Return a kernel with `auto` resolved for a device type: xformers on CUDA where it is installed, else sdpa."""
    if kernel != "auto":
        return kernel
    return "xformers" if device == "cuda" and xformers_is_installed() else "sdpa"


def check_kernel(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> None:
    """Make sure that a kernel supports a head width, dtype and dropout on a device.

    Raises: UserError naming the unmet requirement, and what would work.
    """
    resolved = resolve_kernel(kernel, device.type)
    name = f"decoder.attention_kernel: {resolved}" + (" (auto)" if kernel == "auto" else "")
    dtype_name = str(dtype).removeprefix("torch.")
    problem, remedy = "", "set it to sdpa"
    if resolved in ("xformers", "flex") and device.type != "cuda":
        problem, remedy = f"needs a CUDA device, but the run's is {device.type}", "set it to auto or sdpa"
    elif resolved == "xformers":
        step = 4 if dtype == torch.float32 else 8  # 16 bytes
        if not xformers_is_installed():
            problem, remedy = "is not installed", "install xformers, or set it to auto, flex or sdpa"
        elif dtype not in (torch.float32, *HALF_DTYPES):
            problem = f"does not take {dtype_name}"
        elif head_dim % step:
            problem = f"takes heads of a multiple of {step} in {dtype_name}, but decoder.dim / n_heads is {head_dim}"
            remedy = "change n_heads, or set it to sdpa"
    elif resolved == "flex":
        if dropout:
            problem = f"has no dropout on attention weights, but decoder.attention_dropout_rate is {dropout}"
            remedy = "set the rate to 0, or the kernel to xformers or sdpa"
        elif dtype not in (torch.float32, *HALF_DTYPES):
            problem = f"does not take {dtype_name}"
        elif head_dim < TRITON_MIN_HEAD_DIM:
            problem = f"takes heads of at least {TRITON_MIN_HEAD_DIM}, but decoder.dim / n_heads is {head_dim}"
            remedy = "change n_heads, or set it to sdpa"
    if problem:
        raise UserError(f"{name} {problem}; {remedy}")


# ---- xformers


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Attend within documents over the flattened micro-batch, (B, T, H, K)."""
    if not q.is_cuda:
        raise UserError("decoder.attention_kernel: xformers needs a CUDA device; set it to auto or sdpa on CPU")
    from xformers.ops import memory_efficient_attention

    B, T, H, K = q.shape
    q, k, v = (x.reshape(1, B * T, H, K) for x in (q, k, v))
    # One sequence of B * T positions, which the mask divides into documents.
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask.cached_form(block_diagonal), p=dropout)
    return out.view(B, T, H, K)


def block_diagonal(mask: DocumentMask) -> Any:
    """Return xformers' BlockDiagonalCausalMask of the documents, on their device."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    # Copies through pinned memory, so the host does not wait.
    return BlockDiagonalCausalMask.from_seqlens(mask.lengths, device=mask.device)


@cache
def xformers_is_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


# ---- FlexAttention


def flex(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Attend within documents, row by row, (B, T, H, K); on CPU without autograd, as torch has no backward there."""
    if dropout:
        raise UserError(
            "decoder.attention_kernel: flex has no dropout on attention weights; set decoder.attention_dropout_rate to 0"
        )
    if not q.is_cuda and torch.is_grad_enabled() and q.requires_grad:
        raise UserError("decoder.attention_kernel: flex trains on CUDA devices only; set it to auto or sdpa on CPU")
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
    run = _compiled_flex() if q.is_cuda else flex_attention
    out: Tensor = run(q, k, v, block_mask=mask.cached_form(document_blocks))
    return out.transpose(1, 2)


def document_blocks(mask: DocumentMask) -> Any:
    """Return FlexAttention's BlockMask (B, 1, T, T) of the documents: the non-empty blocks of 128 x 128."""
    from torch.nn.attention.flex_attention import create_block_mask

    document = mask.document

    def within(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[b, query] == document[b, key]) & (query >= key)  # a row's padding is a document too

    build = _compiled_blocks() if mask.device.type == "cuda" else create_block_mask
    # None: one mask for all heads.
    return build(within, mask.n_rows, None, mask.row_len, mask.row_len, device=str(mask.device))


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@cache
def _compiled_blocks() -> Any:
    # Without compilation create_block_mask materialises a (B, T, T) table.
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


# ---- torch's FlashAttention over the stream


def supports_varlen(q: Tensor, dropout: float) -> bool:
    """Return whether `varlen` supports queries of this device, dtype and width."""
    if not q.is_cuda or dropout or q.dtype not in HALF_DTYPES or torch.version.hip is not None:
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= FLASH_MAX_HEAD_DIM
    return fits and torch.cuda.get_device_capability(q.device) >= AMPERE


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    """Attend within documents over the flattened micro-batch by `torch.nn.attention.varlen`, (B, T, H, K)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, K = q.shape
    starts, longest = mask.cached_form(stream_starts), max(mask.lengths)
    q, k, v = (x.reshape(B * T, H, K) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN would compile a plan for each new shape
        # The window reaches back without limit and not ahead: causal.
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.view(B, T, H, K)


def stream_starts(mask: DocumentMask) -> Tensor:
    """Return (documents + 1,) int32 cumulative lengths: the start of each document in the stream, and the stream's end."""
    return to_device(list(accumulate(mask.lengths, initial=0)), torch.int32, mask.device)
