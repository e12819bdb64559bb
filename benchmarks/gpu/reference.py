"""Training as the released code does it: eager, every layer checkpointed, padded rows, one small micro-batch at a time.

The loop of microsoft/unilm's kosmos-2/train.sh and torchscale, rewritten over our own weights: one row of text, or six
padded captions, per micro-batch; xformers' CUTLASS kernel with a causal mask; activations of every layer recomputed in the
backward pass; logits of all positions in float32; `.item()` after each micro-batch. Its loader (images normalised on the
host) and its optimizer are left out, in its favour: kosmos-lit's rates include the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.bench import Bench, Results, drop_gradients
from benchmarks.synthetic_batches import Document
from kosmos_lit.batch import KosmosBatch
from kosmos_lit.layers.block import Block
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.positions import Rotation, rotate, rotation, xpos_tables
from kosmos_lit.ops.splice import splice
from kosmos_lit.tokenizer import IGNORE

MICRO_BATCH = {"text": 1, "caption": 6}
"""Documents per micro-batch."""
N_BATCHES = 20
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference_rate(bench: Bench, model: Kosmos, kind: str) -> Results:
    """Measure forward and backward over micro-batches of a kind, in real positions per second."""
    batches = [padded(bench, documents) for documents in _documents(bench, kind)]
    attend = cutlass() if bench.on_gpu else plain
    tables = xpos_tables(bench.sizes.seq_len, bench.sizes.head_dim).to(bench.device)

    def accumulate() -> None:
        for batch in batches:
            with bench.autocast():
                loss = reference_loss(model, batch, attend, tables)
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()

    seconds = bench.seconds(accumulate, 3) / len(batches)
    drop_gradients(model)
    real = sum(batch.n_real for batch in batches) / len(batches)
    positions = sum(batch.tokens.numel() for batch in batches) / len(batches)
    return {"ms": 1000 * seconds, "tokens/s": real / seconds, "padding": 1 - real / positions, "micro-batches": len(batches)}


def _documents(bench: Bench, kind: str) -> list[list[Document]]:
    """Return the documents of each micro-batch, in random order."""
    draw, batch_size = np.random.default_rng(1), MICRO_BATCH[kind]
    n_batches = 2 if bench.tiny else N_BATCHES
    rows = bench.synthetic().rows(kind, max(2, 4 if kind == "caption" else n_batches), draw)
    documents = [document for row in rows for document in row]
    draw.shuffle(documents)  # type: ignore[arg-type]
    return [documents[i : i + batch_size] for i in range(0, len(documents), batch_size)][:n_batches]


def padded(bench: Bench, documents: Sequence[Document]) -> KosmosBatch:
    """Return one document per row, padded to the longest."""
    longest = max(len(document.tokens) for document in documents)
    return replace(bench.synthetic(), seq_len=longest).batch([[document] for document in documents]).to(bench.device)


def reference_loss(model: Kosmos, batch: KosmosBatch, attend: Attention, tables: Tensor) -> Tensor:
    """Return the mean loss of a padded micro-batch."""
    decoder = model.decoder
    x = decoder.embed_tokens(batch.tokens)
    if len(batch.images):
        x = splice(x, model.encode_images(batch.images), batch.slots)
    x = x * math.sqrt(decoder.config.dim)
    turn = rotation(tables, batch.positions)
    for layer in decoder.layers:
        x = checkpoint(_layer, layer, x, turn, attend, use_reentrant=False)
    logits = F.linear(decoder.layer_norm(x), decoder.embed_tokens.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)


def _layer(layer: Block, x: Tensor, turn: Rotation, attend: Attention) -> Tensor:
    a, (B, T, D) = layer.self_attn, x.shape
    h = layer.self_attn_layer_norm(x)
    q, k, v = (project(h).view(B, T, a.n_heads, -1) for project in (a.q_proj, a.k_proj, a.v_proj))
    q, k = rotate(q, k, turn)
    x = x + a.out_proj(a.inner_attn_ln(attend(q, k, v).reshape(B, T, D)))
    return x + layer.ffn(layer.final_layer_norm(x))  # type: ignore[no-any-return]


def cutlass() -> Attention:
    """Return xformers' CUTLASS kernel under a causal mask.

    Padding needs no mask: it follows the document, so no real position attends to it.
    """
    from xformers.ops import LowerTriangularMask, MemoryEfficientAttentionCutlassOp, memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(  # type: ignore[no-any-return]
            q, k, v, attn_bias=LowerTriangularMask(), op=MemoryEfficientAttentionCutlassOp
        )

    return attend


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by torch's own kernel, for devices without CUDA."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check_agreement(bench: Bench, model: Kosmos, kind: str) -> float:
    """Return the difference between the reference's loss and the model's own for the same documents.

    Raises: RuntimeError if it is more than bf16 explains, as the comparison would mean nothing.
    """
    batch = padded(bench, _documents(bench, kind)[0])
    tables = xpos_tables(bench.sizes.seq_len, bench.sizes.head_dim).to(bench.device)
    with torch.no_grad(), bench.autocast():
        reference = reference_loss(model, batch, cutlass() if bench.on_gpu else plain, tables)
        loss, _ = model.loss(batch, 1 / batch.n_step_targets)
    difference = abs(float(loss) - float(reference))
    if difference > 0.02 * float(reference):
        raise RuntimeError(f"{kind}: the reference's loss is {float(reference)}, the model's own {float(loss)}")
    return difference
