"""The language model: embeddings (image slots replaced by latents), blocks, tied output matrix.

    x = sqrt(D) (embed(tokens) with latents in their slots)     scaled together, as the released models do
    x = blocks(dropout(x + positions))
    hidden = LN(x);  logits = hidden embed'                     no LN where the blocks end in one (post, deepnorm)

Deviation from the paper: a document's positions start at 0 and it attends to itself only, unless
`document_attention: row` lets the documents of a row see the ones before them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.attention import KVCache
from kosmos_lit.layers.block import Block
from kosmos_lit.layers.init import init_decoder
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import rotary_tables, rotation, sinusoids, xpos_tables
from kosmos_lit.ops.splice import splice
from kosmos_lit.tokenizer import PAD


class Decoder(nn.Module):
    """Causal transformer over tokens and image latents."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # `padding_idx`: look-ups of <pad> give its row no gradient.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, padding_idx=PAD)
        self.embed_positions = (
            nn.Embedding(config.max_seq_len, config.dim) if config.positions == "learned" else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout_rate)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.layer_norm = nn.Identity() if config.normalises_sums else nn.LayerNorm(config.dim)
        self._tables: dict[torch.device, Tensor] = {}

    def init(self) -> None:
        init_decoder(self, self.config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: DocumentMask | Tensor | None,
        latents: Tensor | None = None,
        slots: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, D), ready for `logits`.

        Args:
            tokens: (B, T) ids.
            positions: (B, T) position of each token in its document.
            mask: what each position may attend to; None: everything.
            latents: (N, L, D) image latents, or None without images.
            slots: (N, 2) row and first slot of each image.
            cache: the KV cache, one entry per layer; the T new positions are appended to it.
        """
        x = self.embed_tokens(tokens)  # (B, T, D)
        if latents is not None and slots is not None:
            x = splice(x, latents, slots)  # before the scale and the positions, which slots get as tokens do
        x = self._add_positions(x * math.sqrt(self.config.dim), positions)
        x = self.dropout(x)
        rotates = self.config.positions in ("xpos", "rotary")
        rotated = rotation(self._table(x.device), positions) if rotates else None  # once for all layers
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, rotated, cache[i] if cache is not None else None)
        return self.layer_norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V) over the tied embedding."""
        return F.linear(hidden, self.embed_tokens.weight)

    def new_cache(self, n_rows: int, n_positions: int) -> list[KVCache]:
        """Return an empty KV cache for `n_rows` sequences of at most `n_positions`."""
        # The cache has the weights' dtype and device.
        weight = self.embed_tokens.weight
        shape = (n_rows, n_positions, self.config.n_heads, self.config.head_dim)  # (B, S, H, K)
        return [KVCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers]

    def _add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        match self.config.positions:
            case "sinusoidal":
                return x + self._table(x.device)[positions].to(x.dtype)  # (B, T, D)
            case "learned":
                return x + self.embed_positions(positions)  # type: ignore[no-any-return]
        return x

    def _table(self, device: torch.device) -> Tensor:
        """Return the position table on a device, in float32 for every dtype of the weights."""
        # No buffer: it would follow the weights' dtype, and appear in state dicts.
        if device not in self._tables:
            c = self.config
            match c.positions:
                case "xpos":
                    table = xpos_tables(c.max_seq_len, c.head_dim)
                case "rotary":
                    table = rotary_tables(c.max_seq_len, c.head_dim)
                case _:
                    table = sinusoids(c.max_seq_len, c.dim)
            self._tables[device] = table.to(device)
        return self._tables[device]
