"""One decoder layer: attention and feed-forward, each in a residual branch behind a LayerNorm.

    x = x + dropout(attention(LN x))        with a second LayerNorm before its output projection
    x = x + dropout(feed_forward(LN x))     with a second LayerNorm before its output projection

Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.attention import KeyValues, SelfAttention
from kosmos_lit.layers.feed_forward import FeedForward
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import Rotation


class Block(nn.Module):
    """A decoder layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, mask: DocumentMask | Tensor | None, rotation: Rotation | None, seen: KeyValues | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), mask, rotation, seen))
        return x + self.dropout(self.ffn(self.final_layer_norm(x)))  # type: ignore[no-any-return]
