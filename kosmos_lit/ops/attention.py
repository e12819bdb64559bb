"""softmax(q k' / sqrt(K)) v under a mask, by one of several kernels that agree.

The only importer of xformers, and only when it is used. xformers' attention runs on CUDA; elsewhere, and for dense
masks, PyTorch's own kernels do.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.ops.masks import DocumentMask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | Tensor | None, *, dropout: float = 0.0, kernel: str = "auto"
) -> Tensor:
    """Return the attention output, (B, Tq, H, K).

    Args:
        q: (B, Tq, H, K) queries.
        k: (B, Tk, H, K) keys.
        v: (B, Tk, H, K) values.
        mask: documents of the micro-batch, or a bool tensor that broadcasts to (B, H, Tq, Tk), True = may attend.
        dropout: rate on the attention weights; the caller passes 0 outside training.
        kernel: `auto | xformers | sdpa | reference`.

    Raises: UserError if `xformers` is asked for where it cannot run.
    """
    if kernel == "auto":
        kernel = "xformers" if q.is_cuda and isinstance(mask, DocumentMask) and xformers_is_installed() else "sdpa"
    if kernel == "xformers" and isinstance(mask, DocumentMask):
        return _xformers(q, k, v, mask, dropout)
    if kernel == "reference":
        return _reference(q, k, v, mask.dense if isinstance(mask, DocumentMask) else mask, dropout)
    return _sdpa(q, k, v, mask, dropout)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The formula as it stands, softmax in float32: what every other kernel is tested against."""
    scores = torch.einsum("bqhk,bshk->bhqs", q, k).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout).to(q.dtype)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | Tensor | None, dropout: float) -> Tensor:
    if isinstance(mask, DocumentMask):
        mask = mask.additive.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, dropout: float) -> Tensor:
    if not q.is_cuda:
        raise UserError("attention_kernel: xformers needs a CUDA device; use auto or sdpa on CPU")
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    if mask.kernel_bias is None:
        mask.kernel_bias = BlockDiagonalCausalMask.from_seqlens(list(mask.lengths))
    B, T, H, K = q.shape
    q, k, v = (x.reshape(1, B * T, H, K) for x in (q, k, v))
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask.kernel_bias, p=dropout)
    return out.view(B, T, H, K)


@cache
def xformers_is_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None

