"""From features of an image to its latents in the decoder's embedding space.

The resampler of the released models is one cross-attention, without residual, LayerNorm or feed-forward network:

    x = W f                               features (N, P, C) to the decoder's width D
    q = latents,  k = v = [x; latents]    L learned queries, which also stand among the keys
    out = W_o softmax(q k' / sqrt(K)) v   (N, L, D)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmos_lit.config import ConnectorConfig, KosmosConfig
from kosmos_lit.layers.init import uniform_linear
from kosmos_lit.ops.attention import attend


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys that are also the values."""

    def __init__(self, dim: int, n_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.n_heads, self.dropout_rate = n_heads, dropout_rate
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Map queries (N, L, D) and keys (N, M, D) to (N, L, D)."""
        N, L, D = queries.shape
        q = self.q_proj(queries).view(N, L, self.n_heads, -1)  # (N, L, H, K)
        k = self.k_proj(keys).view(N, keys.shape[1], self.n_heads, -1)  # (N, M, H, K)
        v = self.v_proj(keys).view(N, keys.shape[1], self.n_heads, -1)
        out = attend(q, k, v, None, dropout=self.dropout_rate if self.training else 0.0)
        return self.out_proj(out.reshape(N, L, D))  # type: ignore[no-any-return]


class Resampler(nn.Module):
    """KOSMOS-1's resampler; parameter names are those of the released checkpoints."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, dim)
        self.latent_query = nn.Parameter(torch.empty(config.n_latents, dim))
        self.x_attn = CrossAttention(dim, config.n_heads, config.attention_dropout_rate)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        x = self.dense(features)
        latents = self.latent_query.to(x.dtype).expand(len(x), -1, -1)
        return self.x_attn(latents, torch.cat([x, latents], dim=1))  # type: ignore[no-any-return]

    def init(self) -> None:
        uniform_linear(self.dense)
        nn.init.normal_(self.latent_query)
        for projection in (self.x_attn.q_proj, self.x_attn.k_proj, self.x_attn.v_proj):
            uniform_linear(projection)
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.x_attn.out_proj.weight)
        nn.init.zeros_(self.x_attn.out_proj.bias)


class LinearConnector(nn.Module):
    """The plainest alternative: features averaged down to L neighbours in reading order, then one matrix."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        super().__init__()
        self.n_latents = config.n_latents
        self.dense = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        pooled = F.adaptive_avg_pool1d(features.transpose(1, 2), self.n_latents).transpose(1, 2)  # (N, L, C)
        return self.dense(pooled)  # type: ignore[no-any-return]

    def init(self) -> None:
        uniform_linear(self.dense)


def build_connector(config: KosmosConfig, width: int) -> Resampler | LinearConnector:
    """Return the connector that the config asks for, between features of `width` C and the decoder."""
    kinds: dict[str, type[Resampler | LinearConnector]] = {"resampler": Resampler, "linear": LinearConnector}
    return kinds[config.connector.kind](config.connector, width, config.decoder.dim)
