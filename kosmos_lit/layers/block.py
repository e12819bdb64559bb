"""One decoder layer: attention and feed-forward, each a branch f beside a residual.

    sub, pre    x = x + dropout(f(LN x))             sub: a second LayerNorm inside f, before its output projection
    post        x = LN(x + dropout(f(x)))            Attention Is All You Need (arXiv 1706.03762), section 3.1
    deepnorm    x = LN(alpha x + dropout(f(x)))      alpha = (2L)^(1/4): DeepNet (arXiv 2203.00555), decoder-only

Parameter names are those of the released checkpoints, whatever the norm.
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
        self.normalises_sums, self.residual_scale = config.normalises_sums, config.residual_scale

    def forward(
        self, x: Tensor, mask: DocumentMask | Tensor | None, rotation: Rotation | None, seen: KeyValues | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if self.normalises_sums:
            alpha = self.residual_scale
            x = self.self_attn_layer_norm(alpha * x + self.dropout(self.self_attn(x, mask, rotation, seen)))
            return self.final_layer_norm(alpha * x + self.dropout(self.ffn(x)))  # type: ignore[no-any-return]
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), mask, rotation, seen))
        return x + self.dropout(self.ffn(self.final_layer_norm(x)))  # type: ignore[no-any-return]
