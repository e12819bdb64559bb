"""Feed-forward network with sub-LayerNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.linear import linear


class FeedForward(nn.Module):
    """fc2(LN(gelu(fc1 x))) with exact GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = linear(config, config.dim, config.ffn_dim)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim) if config.norm == "sub" else nn.Identity()
        self.fc2 = linear(config, config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        # GELU's kernels compute in float32 for every dtype and round once, so 16 bits need no cast.
        hidden = F.gelu(self.fc1(x))
        return self.fc2(self.ffn_layernorm(hidden))  # type: ignore[no-any-return]
