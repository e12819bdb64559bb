"""softmax(q k' / sqrt(K)) v under a mask, by one of several kernels with equal results."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kosmos_lit.ops.documents import attend_documents, disable_cudnn_attention
from kosmos_lit.ops.kernels import choose_kernel, cudnn, flex, supports_varlen, varlen, xformers
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
        kernel: `auto | xformers | cudnn | flex | sdpa | reference`. xformers, cudnn and flex take documents only: with a
            tensor as mask, or without one, the kernel is sdpa on any device.

    Raises: UserError if the kernel cannot run on these tensors; `check_kernel` finds that before a run.
    """
    if kernel == "reference":
        return reference(q, k, v, mask.dense if isinstance(mask, DocumentMask) else mask, dropout)
    if not isinstance(mask, DocumentMask):
        return _sdpa(q, k, v, mask, dropout)
    match choose_kernel(kernel, q, dropout):
        case "xformers":
            return xformers(q, k, v, mask, dropout)
        case "cudnn":
            return cudnn(q, k, v, mask, dropout)
        case "flex":
            return flex(q, k, v, mask, dropout)
    if supports_varlen(q, dropout):
        return varlen(q, k, v, mask)
    return attend_documents(q, k, v, mask, dropout)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return the formula written out, with softmax in float32: the reference in the tests of all other kernels."""
    scores = torch.einsum("bqhk,bshk->bhqs", q, k).float() / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout).to(q.dtype)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)  # (B, Tq, H, K)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
    with disable_cudnn_attention():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
