"""One decoder layer: attention and feed-forward network, each a branch f of the residual stream.

    sub, pre    x = x + dropout(f(LN x))             sub: a second LayerNorm inside f, before its output projection
    post        x = LN(x + dropout(f(x)))            Attention Is All You Need (arXiv 1706.03762), section 3.1
    deepnorm    x = LN(alpha x + dropout(f(x)))      alpha = (2L)^(1/4): DeepNet (arXiv 2203.00555), decoder-only

Parameter names are those of the released checkpoints for every norm.

A layer is two parts around the attention kernel: the projections to q, k and v, and everything after the kernel. Only the
kernel depends on the documents of a micro-batch, so the parts have the same shapes at every step: `compile_parts` compiles
each into one graph, which all layers of a model share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.attention import KVCache, SelfAttention
from kosmos_lit.layers.feed_forward import FeedForward
from kosmos_lit.ops.graphs import Compiler, Graphs
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import Rotation

aten = torch.ops.aten
MATMULS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default]
"""Outputs that `recompute: selective` keeps: nearly all of a part's arithmetic, in less than half of its memory."""


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
        self.recompute = config.recompute
        self._compiler: Compiler | None = None

    def compile_parts(self, compiler: Compiler | None = None) -> None:
        """Compile each part by torch.compile; with a KV cache or a tensor as mask the layer still runs eagerly.

        Args:
            compiler: of all layers of a model; None: graphs of this layer's own.
        """
        self._compiler = compiler or Graphs()

    def forward(
        self, x: Tensor, mask: DocumentMask | Tensor | None, rotation: Rotation | None, cache: KVCache | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        # Without gradients nothing is kept, and a cache must not be appended to twice.
        if self.recompute == "full" and torch.is_grad_enabled() and cache is None:
            out: Tensor = checkpoint(self._run, x, mask, rotation, use_reentrant=False)
            return out
        return self._run(x, mask, rotation, cache)

    def _run(
        self, x: Tensor, mask: DocumentMask | Tensor | None, rotation: Rotation | None, cache: KVCache | None = None
    ) -> Tensor:
        recomputes = self.recompute == "selective" and torch.is_grad_enabled()
        before, after = (_recomputed_before, _recomputed_after) if recomputes else (_before_kernel, _after_kernel)
        # Generation has other shapes at each call, and would compile each time.
        if self._compiler is not None and cache is None and isinstance(mask, DocumentMask):
            before, after = self._compiler(before), self._compiler(after)  # B and T are those of every step
        q, k, v = before(self, x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        out: Tensor = after(self, x, self.self_attn.attend(q, k, v, mask))
        return out


def _before_kernel(block: Block, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    """Map the layer's input (B, T, D) to queries, keys and values, (B, T, H, K) each."""
    return block.self_attn.project(x if block.normalises_sums else block.self_attn_layer_norm(x), rotation)


def _after_kernel(block: Block, x: Tensor, heads: Tensor) -> Tensor:
    """Map the layer's input (B, T, D) and the kernel's output (B, T, H, K) to the layer's output (B, T, D)."""
    branch = block.dropout(block.self_attn.join(heads))
    if block.normalises_sums:
        alpha = block.residual_scale
        x = block.self_attn_layer_norm(alpha * x + branch)
        return block.final_layer_norm(alpha * x + block.dropout(block.ffn(x)))  # type: ignore[no-any-return]
    x = x + branch
    return x + block.dropout(block.ffn(block.final_layer_norm(x)))  # type: ignore[no-any-return]


def _recomputed_before(block: Block, x: Tensor, rotation: Rotation | None) -> Any:
    """Return `_before_kernel`; only its matrix products are kept for the backward pass."""
    return checkpoint(partial(_before_kernel, block), x, rotation, use_reentrant=False, context_fn=_keep_matmuls)


def _recomputed_after(block: Block, x: Tensor, heads: Tensor) -> Any:
    """Return `_after_kernel`; only its matrix products are kept for the backward pass."""
    return checkpoint(partial(_after_kernel, block), x, heads, use_reentrant=False, context_fn=_keep_matmuls)


def _keep_matmuls() -> Any:
    return create_selective_checkpoint_contexts(MATMULS)  # type: ignore[no-untyped-call]
