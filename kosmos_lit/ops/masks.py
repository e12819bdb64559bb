"""Attention masks: causal, within documents.

A micro-batch is a stream of B * T positions, divided into documents by `lengths`. A row's padding is a document of its own,
so that every softmax has a key; a kernel may skip it, as its output is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Form = TypeVar("Form")


class DocumentMask:
    """Causal attention within documents, convertible to each kernel's own form."""

    def __init__(
        self,
        lengths: Sequence[int],
        n_rows: int,
        row_len: int,
        device: torch.device,
        padding: Sequence[int] = (),
    ) -> None:
        """Store the layout of a micro-batch.

        Args:
            lengths: of the documents in the flattened stream; no document crosses a row's end.
            n_rows: B.
            row_len: T.
            device: of the kernels' forms.
            padding: positions of padding at each row's end, which are the whole last document; empty: unknown.
        """
        assert sum(lengths) == n_rows * row_len, f"documents of {sum(lengths)} positions in {n_rows} x {row_len}"
        self.lengths = tuple(lengths)
        self.n_rows, self.row_len, self.device = n_rows, row_len, device
        self.padding = tuple(padding) or (0,) * n_rows
        self._forms: dict[object, Any] = {}

    def cached_form(self, build: Callable[[DocumentMask], Form]) -> Form:
        """Return `build(self)`, a kernel's form of this mask, built once for all layers."""
        if build not in self._forms:
            self._forms[build] = build(self)
        return self._forms[build]  # type: ignore[no-any-return]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First position in the stream and length of each document that is not padding."""
        firsts = accumulate(self.lengths, initial=0)
        spans = []
        # `firsts` ends with the stream's length, one more than there are documents.
        for first, length in zip(firsts, self.lengths, strict=False):
            # The last position's row and column: padding reaches a row's end.
            row, end = divmod(first + length - 1, self.row_len)
            if not (self.padding[row] and end == self.row_len - 1):
                spans.append((first, length))
        return spans

    @cached_property
    def document(self) -> Tensor:
        """(B, T) int64: number of each position's document in the stream."""
        lengths = to_device(self.lengths, torch.int64, self.device)
        numbers = torch.arange(len(self.lengths), device=self.device)
        # With the size known beforehand, the host need not wait for a GPU's sum.
        flat = numbers.repeat_interleave(lengths, output_size=self.n_rows * self.row_len)
        return flat.view(self.n_rows, self.row_len)

    @cached_property
    def dense(self) -> Tensor:
        """(B, 1, T, T) bool: True where a query (second last axis) may see a key (last axis)."""
        same = self.document[:, :, None] == self.document[:, None, :]
        return (same & causal(self.row_len, self.row_len, self.device)).unsqueeze(1)


def to_device(values: Sequence[int] | NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device, without making the host wait for a GPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def causal(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return (n_queries, n_keys) bool, aligned at the end: the last query sees every key, the one before it all but one."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def padded_positions(real: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and mask of rows that hold one document each, padded on the left or on the right.

    A padded position sees itself, so that its softmax is defined; no other position sees it.

    Args:
        real: (B, T) bool, False at padding.

    Returns: (B, T) position of each token in its document; (B, 1, T, T) bool mask.
    """
    T = real.shape[1]
    itself = torch.eye(T, dtype=torch.bool, device=real.device)
    mask = causal(T, T, real.device) & (real[:, None, :] | itself)
    # Padding on the left counts as -1: any valid position will do.
    return (real.cumsum(1) - 1).clamp(min=0), mask.unsqueeze(1)
