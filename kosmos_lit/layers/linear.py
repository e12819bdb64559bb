"""Linear layers of the blocks, in 8 bits with `decoder.fp8`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.ops.fp8 import linear_fp8


class LinearFp8(nn.Linear):
    """A linear layer that trains in 8 bits; without gradient it is an ordinary one, on any device."""

    def __init__(self, n_in: int, n_out: int, *, rowwise: bool) -> None:
        super().__init__(n_in, n_out)
        self.rowwise = rowwise

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        return linear_fp8(x, self.weight, self.bias, rowwise=self.rowwise)


def linear(config: DecoderConfig, n_in: int, n_out: int) -> nn.Linear:
    """Return a layer from `n_in` to `n_out`."""
    return nn.Linear(n_in, n_out) if config.fp8 == "none" else LinearFp8(n_in, n_out, rowwise=config.fp8 == "rowwise")
