"""Which positions may attend to which: causal, and within one document.

A micro-batch is one stream of B * T positions cut into documents; `lengths` says where. Padding is a document of its
own, so that every position has something to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class DocumentMask:
    """Causal attention within documents, in the form that each attention kernel wants."""

    def __init__(self, lengths: Sequence[int], n_rows: int, row_len: int, device: torch.device) -> None:
        """Take the documents' lengths in the flattened stream; no document reaches over a row's end."""
        assert sum(lengths) == n_rows * row_len, f"documents of {sum(lengths)} positions in {n_rows} x {row_len}"
        self.lengths = tuple(lengths)
        self.n_rows, self.row_len, self.device = n_rows, row_len, device
        self.kernel_bias: Any = None  # a kernel's own form of this mask, kept for the other layers

    @cached_property
    def dense(self) -> Tensor:
        """(B, 1, T, T) bool: True where a query (second last axis) may see a key (last axis)."""
        lengths = torch.tensor(self.lengths, device=self.device)
        document = torch.arange(len(self.lengths), device=self.device).repeat_interleave(
            lengths, output_size=self.n_rows * self.row_len
        )
        document = document.view(self.n_rows, self.row_len)
        same = document[:, :, None] == document[:, None, :]
        return (same & causal(self.row_len, self.row_len, self.device)).unsqueeze(1)

    @cached_property
    def additive(self) -> Tensor:
        """(B, 1, T, T) float32: 0 where attention is allowed, -inf elsewhere; spares each layer the conversion."""
        return torch.zeros(self.dense.shape, device=self.device).masked_fill_(~self.dense, float("-inf"))


def causal(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return (n_queries, n_keys) bool: the last query sees every key, the one before it all but the last, and so on."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def padded(real: Tensor) -> tuple[Tensor, Tensor]:
    """Place rows of one document each that are padded on the left or on the right.

    A padded position sees itself, so that its softmax is defined; nothing else sees it.

    Args:
        real: (B, T) bool, False at padding.

    Returns: (B, T) position of each token in its document; (B, 1, T, T) bool mask.
    """
    T = real.shape[1]
    itself = torch.eye(T, dtype=torch.bool, device=real.device)
    mask = causal(T, T, real.device) & (real[:, None, :] | itself)
    return (real.cumsum(1) - 1).clamp(min=0), mask.unsqueeze(1)
