"""Multi-head causal self-attention with sub-LayerNorm and xPos (Magneto, arXiv 2210.06423; KOSMOS-1 section 2.1)."""

from __future__ import annotations

from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.linear import linear
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.kernels import choose_kernel
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import Rotation, rotate


class KVCache:
    """The KV cache of one layer, in buffers of fixed size."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Start empty in two (B, S, H, K) buffers for S positions."""
        self.keys, self.values, self.length = keys, values, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, H, K) keys and values; return all so far, (B, length, H, K) each."""
        end = self.length + k.shape[1]
        self.keys[:, self.length : end], self.values[:, self.length : end] = k, v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]  # views


class SelfAttention(nn.Module):
    """softmax(q k') v over the heads, LayerNorm on their concatenation, output projection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.n_heads, self.kernel = config.n_heads, config.attention_kernel
        self.dropout_rate, self.within = config.attention_dropout_rate, config.document_attention
        self.q_proj = linear(config, config.dim, config.dim)
        self.k_proj = linear(config, config.dim, config.dim)
        self.v_proj = linear(config, config.dim, config.dim)
        self.inner_attn_ln = nn.LayerNorm(config.dim) if config.norm == "sub" else nn.Identity()
        self.out_proj = linear(config, config.dim, config.dim)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, T, D) to queries, keys and values, (B, T, H, K) each."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, -1)  # (B, T, H, K)
        k = self.k_proj(x).view(B, T, self.n_heads, -1)
        v = self.v_proj(x).view(B, T, self.n_heads, -1)
        if rotation is not None:
            q, k = rotate(q, k, rotation)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | Tensor | None) -> Tensor:
        """Return the attention output of the T queries, (B, T, H, K)."""
        # By the rate of training in evaluation too, so that what is checked and measured there is the kernel that trains.
        kernel = choose_kernel(self.kernel, q, self.dropout_rate, self.within)
        return attend(q, k, v, mask, dropout=self.dropout_rate if self.training else 0.0, kernel=kernel)

    def join(self, out: Tensor) -> Tensor:
        """Map the heads' outputs (B, T, H, K) to (B, T, D)."""
        return self.out_proj(self.inner_attn_ln(out.flatten(2)))  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, mask: DocumentMask | Tensor | None, rotation: Rotation | None, cache: KVCache | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); with a cache, the T new positions are appended to it and attend to all of it."""
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.join(self.attend(q, k, v, mask))
