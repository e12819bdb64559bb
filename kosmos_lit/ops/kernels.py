"""Attention kernels for documents on GPUs, and their requirements. The only importer of xformers, lazily.

| kernel    | device                 | dtypes          | head width                   | dropout on the weights |
|-----------|------------------------|-----------------|------------------------------|------------------------|
| xformers  | CUDA                   | float32, 16-bit | multiple of 4 (float32) or 8 | yes                    |
| cudnn     | Hopper, Blackwell      | 16-bit          | multiple of 8, up to 128     | no                     |
| flex      | CUDA                   | float32, 16-bit | at least 16 (Triton's dot)   | no                     |
| sdpa      | any                    | any             | any                          | yes                    |
| reference | any                    | any             | any                          | yes                    |

xformers runs torch's own FlashAttention-2 and CUTLASS kernels. `cudnn` needs torch 2.15 and cuDNN 9.25. On CUDA in 16 bits
`sdpa` is torch's FlashAttention over the whole stream where that supports the head width and there is no dropout; otherwise
it runs document by document, as on CPU (`ops.documents`). `auto` is decided by `ops.kernel_figures`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.ops.kernel_figures import Within, faster_kernels
from kosmos_lit.ops.masks import DocumentMask, to_device

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_DIM = 256
"""Widest head of FlashAttention-2."""
AMPERE = (8, 0)
"""Oldest CUDA capability of FlashAttention-2."""
TRITON_MIN_HEAD_DIM = 16
"""Narrowest head of FlexAttention."""
CUDNN_MAX_HEAD_DIM = 128
CUDNN_MAJORS = (9, 10)
"""CUDA capabilities of cuDNN's attention within documents, major numbers: Hopper and the Blackwell of data centres."""
CUDNN_MIN_TORCH = (2, 15)
"""First torch known to offer cuDNN for causal attention within documents. The private operator of 2.11 is no substitute: its
backward pass takes the head width for the longest document, and reaches past its buffers (pytorch pull request 186142)."""
CUDNN_MIN_VERSION = 92500
"""First cuDNN with documents of length 0 (cudnn-frontend issue 943), which pad our lists of documents."""


@dataclass(frozen=True, kw_only=True)
class AttentionUse:
    """What a run or a call asks of an attention kernel."""

    device: str
    """cuda or cpu."""
    dtype: torch.dtype
    head_dim: int
    dropout: float
    """Rate on the attention weights."""
    within: Within = "own"
    """`decoder.document_attention`."""
    capability: tuple[int, int] | None = None
    """Of a CUDA device; None: not known."""


def choose_kernel(kernel: str, q: Tensor, dropout: float, within: Within = "own") -> str:
    """Return a kernel with `auto` resolved for queries (..., K) on their device."""
    if kernel != "auto":
        return kernel
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    use = AttentionUse(
        device=q.device.type, dtype=q.dtype, head_dim=q.shape[-1], dropout=dropout, within=within, capability=capability
    )
    return resolve_kernel(kernel, use)


def resolve_kernel(kernel: str, use: AttentionUse) -> str:
    """Return a kernel with `auto` resolved: on CUDA the first by `kernel_figures`, else xformers if installed, else sdpa."""
    if kernel != "auto":
        return kernel
    if use.device != "cuda":
        return "sdpa"
    if use.capability is not None:
        for fast in faster_kernels(use.capability, torch_version(), use.head_dim, use.within):
            if unmet_requirement(fast, use) is None:
                return fast
    return "xformers" if xformers_is_installed() else "sdpa"


def check_kernel(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float,
    *,
    within: Within = "own",
    capability: tuple[int, int] | None = None,
) -> str:
    """Return a kernel with `auto` resolved, after making sure that it supports a head width, dtype and dropout on a device.

    Args:
        kernel: `decoder.attention_kernel`.
        device: of the run.
        dtype: compute dtype of its precision.
        head_dim: K.
        dropout: rate on the attention weights.
        within: `decoder.document_attention`.
        capability: of a CUDA device; None: not known, and not checked.

    Raises: UserError naming the unmet requirement, and what would work.
    """
    use = AttentionUse(
        device=device.type, dtype=dtype, head_dim=head_dim, dropout=dropout, within=within, capability=capability
    )
    resolved = resolve_kernel(kernel, use)
    if (unmet := unmet_requirement(resolved, use)) is not None:
        problem, remedy = unmet
        name = f"decoder.attention_kernel: {resolved}" + (" (auto)" if kernel == "auto" else "")
        raise UserError(f"{name} {problem}; {remedy}")
    return resolved


def unmet_requirement(kernel: str, use: AttentionUse) -> tuple[str, str] | None:
    """Return what a kernel lacks for a use, and what to do; None if nothing is known to be missing."""
    if kernel in ("sdpa", "reference"):
        return None
    if use.device != "cuda":
        return f"needs a CUDA device, but the run's is {use.device}", "set it to auto or sdpa"
    dtype, width = str(use.dtype).removeprefix("torch."), f"decoder.dim / n_heads is {use.head_dim}"
    dtypes = HALF_DTYPES if kernel == "cudnn" else (torch.float32, *HALF_DTYPES)
    if kernel == "xformers" and not xformers_is_installed():
        return "is not installed", "install xformers, or set it to auto, flex or sdpa"
    if kernel == "cudnn" and (missing := _missing_for_cudnn(use.capability)):
        return missing, "set it to auto, xformers or sdpa"
    if kernel != "xformers" and use.dropout:
        problem = f"has no dropout on attention weights, but decoder.attention_dropout_rate is {use.dropout}"
        return problem, "set the rate to 0, or the kernel to xformers or sdpa"
    if use.dtype not in dtypes:
        bf16 = "set trainer.precision to bf16-mixed, or the kernel to xformers or sdpa"
        return f"does not take {dtype}", bf16 if kernel == "cudnn" else "set it to sdpa"
    step = {"xformers": 4 if use.dtype == torch.float32 else 8, "cudnn": 8}.get(kernel, 1)  # 16 bytes
    if use.head_dim % step:
        return f"takes heads of a multiple of {step} in {dtype}, but {width}", "change n_heads, or set it to sdpa"
    if kernel == "cudnn" and use.head_dim > CUDNN_MAX_HEAD_DIM:
        return f"takes heads of at most {CUDNN_MAX_HEAD_DIM}, but {width}", "change n_heads, or set it to auto or sdpa"
    if kernel == "flex" and use.head_dim < TRITON_MIN_HEAD_DIM:
        return f"takes heads of at least {TRITON_MIN_HEAD_DIM}, but {width}", "change n_heads, or set it to sdpa"
    return None


def torch_version() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


# ---- xformers


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Attend within documents over the flattened micro-batch, (B, T, H, K)."""
    if not q.is_cuda:
        raise UserError("decoder.attention_kernel: xformers needs a CUDA device; set it to auto or sdpa on CPU")
    ops = xformers_ops()
    B, T, H, K = q.shape
    q, k, v = (x.reshape(1, B * T, H, K) for x in (q, k, v))
    # One sequence of B * T positions, which the mask divides into documents.
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=mask.cached_form(block_diagonal), p=dropout)
    return out.view(B, T, H, K)


def block_diagonal(mask: DocumentMask) -> Any:
    """Return xformers' BlockDiagonalCausalMask of the documents, on their device."""
    # Copies through pinned memory, so the host does not wait.
    return xformers_ops().fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(mask.lengths, device=mask.device)


@cache
def xformers_ops() -> Any:
    """Return `xformers.ops`, imported without its warning that its C++ extension does not load."""
    with _without_extension_warning():
        import xformers.ops
    return xformers.ops


@contextmanager
def _without_extension_warning() -> Iterator[None]:
    # xformers' wheel is built for one torch, and with any other warns that attention is not available. That holds no longer:
    # since 0.0.35, the oldest that we take, its attention runs torch's own operators, and the extension has none.
    def is_of_use(record: logging.LogRecord) -> bool:
        return "xFormers can't load C++/CUDA extensions" not in record.getMessage()

    logger = logging.getLogger("xformers")
    logger.addFilter(is_of_use)
    try:
        yield
    finally:
        logger.removeFilter(is_of_use)


@cache
def xformers_is_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


# ---- cuDNN


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    """Attend within documents over the flattened micro-batch by cuDNN, (B, T, H, K)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UserError(
            "decoder.attention_kernel: cudnn has no dropout on attention weights; set decoder.attention_dropout_rate to 0"
        )
    if not q.is_cuda or torch_version() < CUDNN_MIN_TORCH:
        raise UserError("decoder.attention_kernel: cudnn needs a CUDA device and torch 2.15; set it to auto or sdpa")
    B, T, H, K = q.shape
    starts, longest = mask.cached_form(padded_starts)
    q, k, v = (x.reshape(B * T, H, K) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # an error, and no other kernel, where cuDNN refuses
        # One tensor for queries and keys: only then cuDNN's causal mask is known to be the right one.
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.view(B, T, H, K)


def padded_starts(mask: DocumentMask) -> tuple[Tensor, int]:
    """Return the starts of the documents, int32, padded by empty ones at the stream's end, and a bound of their lengths.

    cuDNN compiles a plan for each number of documents and each bound, so both are powers of two (the bound at most T). In
    the backward pass it has a float32 buffer of documents x bound x H x K, so neither is larger than it must be.
    """
    n_documents = _power_of_two(len(mask.lengths))
    starts = list(accumulate(mask.lengths, initial=0))
    starts += [starts[-1]] * (n_documents - len(mask.lengths))
    return to_device(starts, torch.int32, mask.device), min(_power_of_two(max(mask.lengths)), mask.row_len)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def _missing_for_cudnn(capability: tuple[int, int] | None) -> str:
    """Return what cuDNN's attention within documents lacks here, or nothing."""
    if torch_version() < CUDNN_MIN_TORCH:
        return f"needs torch {'.'.join(map(str, CUDNN_MIN_TORCH))}, but this is {torch.__version__}"
    if torch.version.hip is not None:
        return "needs an NVIDIA device"
    if (version := cudnn_version()) < CUDNN_MIN_VERSION:
        return f"needs cuDNN {CUDNN_MIN_VERSION}, but torch has {version or 'none'}"
    if capability is not None and capability[0] not in CUDNN_MAJORS:
        own = ".".join(map(str, capability))
        return f"needs a device of capability 9 or 10 (Hopper, Blackwell), but the run's has {own}"
    return ""


def cudnn_version() -> int:
    """Return cuDNN's version, 92500 for 9.25.0; 0 without cuDNN."""
    return torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]


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
