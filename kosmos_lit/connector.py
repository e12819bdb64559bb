"""Connectors: from image features f (N, P, C) to latents in the decoder's embedding space (N, L, D).

    resampler   x = W f;  q = latents;  k = v = [x; latents]            one cross-attention and nothing else: no residual,
                out = W_o softmax(q k' / sqrt(K)) v                     LayerNorm or feed-forward network (released models)
    perceiver   x = x + attention(q = LN x, k = v = [LN f; LN x])       n_layers of both at width C from learned latents x,
                x = x + feed_forward(LN x);  out = W LN x               then a matrix (Flamingo, arXiv 2204.14198, figure 5)
    linear      out = W mean(neighbouring f)                            L runs of features in reading order
    mlp         out = W_2 gelu(W_1 mean(neighbouring f))                LLaVA-1.5's projector (arXiv 2310.03744, section 3.2)
    pool        out = W softmax(latents f' / sqrt(C)) f                 `linear` with a learned mean for each latent

`linear` with L = P is the released code's `simple` connector. Its `complex` one is `mlp` with a hidden width of C
instead of D.

Flamingo's figure leaves LayerNorms and biases open; as in the open re-implementations, latents and features have LayerNorms
of their own, one closes the stack, and its matrices have no bias. Its time embedding of video frames is left out. W has a
bias, as in the other connectors.

Initial weights: W, W_1 and W_2 PyTorch's default; latents N(0, 1), as released. The resampler's projections follow fairseq's
MultiheadAttention: q, k, v Xavier uniform with gain 1/sqrt 2 and the default bias, out with gain 1 and bias 0. The
perceiver's matrices have PyTorch's default. Neither the norm's gain nor `decoder.init` applies here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmos_lit.config import ConnectorConfig, KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers.init import uniform_linear
from kosmos_lit.ops.attention import attend


class CrossAttention(nn.Module):
    """Multi-head attention of queries to one sequence of keys and values."""

    def __init__(self, dim: int, n_heads: int, dropout_rate: float, *, bias: bool = True) -> None:
        super().__init__()
        self.n_heads, self.dropout_rate = n_heads, dropout_rate
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Map queries (N, L, D) and keys (N, M, D) to (N, L, D)."""
        N, L, D = queries.shape
        q = self.q_proj(queries).view(N, L, self.n_heads, -1)  # (N, L, H, K)
        k = self.k_proj(keys).view(N, keys.shape[1], self.n_heads, -1)  # (N, M, H, K)
        v = self.v_proj(keys).view(N, keys.shape[1], self.n_heads, -1)
        out = attend(q, k, v, None, dropout=self.dropout_rate if self.training else 0.0)  # (N, L, H, K)
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
        x = self.dense(features)  # (N, P, D)
        # Under autocast x has 16 bits, while the parameter stays float32.
        latents = self.latent_query.to(x.dtype).expand(len(x), -1, -1)
        return self.x_attn(latents, torch.cat([x, latents], dim=1))  # type: ignore[no-any-return]  # keys (N, P + L, D)

    def init(self) -> None:
        uniform_linear(self.dense)
        nn.init.normal_(self.latent_query)
        for projection in (self.x_attn.q_proj, self.x_attn.k_proj, self.x_attn.v_proj):
            uniform_linear(projection)  # for the bias: Xavier replaces the weight
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.x_attn.out_proj.weight)
        nn.init.zeros_(self.x_attn.out_proj.bias)


class PerceiverLayer(nn.Module):
    """Cross-attention of latents to features and latents, then a feed-forward network, each beside a residual."""

    def __init__(self, width: int, n_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.features_layer_norm = nn.LayerNorm(width)
        self.latents_layer_norm = nn.LayerNorm(width)
        # No biases in the layers' matrices, as in re-implementations of Flamingo.
        self.x_attn = CrossAttention(width, n_heads, dropout_rate, bias=False)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Map latents (N, L, C), given features (N, P, C), to (N, L, C)."""
        latents = self.latents_layer_norm(x)  # (N, L, C)
        x = x + self.x_attn(latents, torch.cat([self.features_layer_norm(features), latents], dim=1))
        hidden = self.fc1(self.final_layer_norm(x)).relu().square()  # squared ReLU: Flamingo's table of sizes
        return x + self.fc2(hidden)  # type: ignore[no-any-return]


class Perceiver(nn.Module):
    """Flamingo's Perceiver Resampler, then a matrix to the decoder's width."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        """Raises: UserError if the heads do not divide the tower's width."""
        super().__init__()
        # Not in the config's checks: only a built tower knows its width.
        if width % config.n_heads:
            raise UserError(
                f"connector.n_heads {config.n_heads} does not divide the tower's width {width}, at which a perceiver works"
            )
        self.latent_query = nn.Parameter(torch.empty(config.n_latents, width))
        self.layers = nn.ModuleList(
            PerceiverLayer(width, config.n_heads, config.attention_dropout_rate) for _ in range(config.n_layers)
        )
        self.layer_norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        x = self.latent_query.to(features.dtype).expand(len(features), -1, -1)  # (N, L, C)
        for layer in self.layers:
            x = layer(x, features)
        return self.dense(self.layer_norm(x))  # type: ignore[no-any-return]

    def init(self) -> None:
        nn.init.normal_(self.latent_query)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                uniform_linear(module)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


class LinearConnector(nn.Module):
    """Means of L runs of neighbouring features in reading order, then one matrix."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        super().__init__()
        self.n_latents = config.n_latents
        self.dense = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        return self.dense(average_neighbours(features, self.n_latents))  # type: ignore[no-any-return]

    def init(self) -> None:
        uniform_linear(self.dense)


class MlpConnector(nn.Module):
    """The same means, then two matrices with a GELU between them; the hidden layer is as wide as the decoder."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        super().__init__()
        self.n_latents = config.n_latents
        self.dense = nn.Linear(width, dim)
        self.predict = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        hidden = F.gelu(self.dense(average_neighbours(features, self.n_latents)))
        return self.predict(hidden)  # type: ignore[no-any-return]

    def init(self) -> None:
        uniform_linear(self.dense)
        uniform_linear(self.predict)


class PoolConnector(nn.Module):
    """Attentive pooling: one learned query per latent, features as keys and values, then one matrix."""

    def __init__(self, config: ConnectorConfig, width: int, dim: int) -> None:
        super().__init__()
        self.latent_query = nn.Parameter(torch.empty(config.n_latents, width))
        self.dense = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, P, C) to (N, L, D)."""
        queries = self.latent_query.to(features.dtype).expand(len(features), -1, -1)  # (N, L, C)
        keys = features.unsqueeze(2)  # (N, P, 1, C): a single head
        pooled = attend(queries.unsqueeze(2), keys, keys, None).squeeze(2)  # (N, L, C)
        return self.dense(pooled)  # type: ignore[no-any-return]

    def init(self) -> None:
        nn.init.normal_(self.latent_query)
        uniform_linear(self.dense)


def average_neighbours(features: Tensor, n_latents: int) -> Tensor:
    """Map (N, P, C) to (N, L, C): means of L runs of features, neighbouring ones share one where L does not divide P."""
    # Pooling runs along the last axis: (N, C, P) -> (N, C, L).
    return F.adaptive_avg_pool1d(features.transpose(1, 2), n_latents).transpose(1, 2)


Connector = Resampler | Perceiver | LinearConnector | MlpConnector | PoolConnector
KINDS: dict[str, type[Connector]] = {
    "resampler": Resampler,
    "perceiver": Perceiver,
    "linear": LinearConnector,
    "mlp": MlpConnector,
    "pool": PoolConnector,
}


def build_connector(config: KosmosConfig, width: int) -> Connector:
    """Return the connector of a config, for features of `width` C."""
    return KINDS[config.connector.kind](config.connector, width, config.decoder.dim)
