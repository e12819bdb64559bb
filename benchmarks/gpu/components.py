"""Components of a step on a GPU, within ten minutes: rates, attention, a block, the loss, CLIP, steps of text.

Random data (zeros draw less power and would flatter); medians of 20 after a warm-up. Attention counts as 4 K operations per
head and pair of positions forward, and 2.5 times that backward, in the causal half.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench, Results, TrainStep, attempts, drop_gradients
from kosmos_lit.config import KosmosConfig
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.layers.block import Block
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.graphs import Graphs
from kosmos_lit.ops.kernels import check_kernel
from kosmos_lit.ops.losses import weighted_nll
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import rotation, xpos_tables
from kosmos_lit.vision import VisionTower

CAPTION = 84
"""Positions of a typical caption pair."""


def rates(bench: Bench) -> Results:
    """The yardsticks: the rates of a large matrix product and of a copy."""
    n = bench.sizes.matmul
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bench.matmul_rate = 2 * n**3 / bench.seconds(lambda: torch.mm(a, b, out=out), 50 if bench.on_gpu else None)
    source = torch.randint(0, 256, (bench.sizes.copy_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.copy_rate = 2 * source.numel() / bench.seconds(lambda: target.copy_(source))
    return {"product of side": n, "copy of bytes": source.numel()}


def xformers_info(bench: Bench) -> Results:
    """The output of `xformers.info`, and whether its attention runs."""
    info = subprocess.run([sys.executable, "-m", "xformers.info"], text=True, capture_output=True)
    lines = info.stdout.splitlines() if info.returncode == 0 else info.stderr.splitlines()[-1:]
    q = torch.randn(1, 128, 2, 64, device=bench.device, dtype=torch.bfloat16)
    mask = DocumentMask((64, 64), 1, 128, bench.device)
    runs = attempts({"attention": lambda: {"shape": list(attend(q, q, q, mask, kernel="xformers").shape)}})
    return {"info": lines, "torch": torch.__version__, "CUDA": torch.version.cuda, **runs}


# ---- attention


def attention(bench: Bench) -> Results:
    """Heads of 64 forward and backward: rows of one document, packed documents, and packed captions."""
    s, T = bench.sizes, bench.sizes.seq_len
    n_rows = 1 if bench.tiny else 8192 // T
    per_row = {"one document": (T,), "documents": _documents(T), "captions": (CAPTION,) * (T // CAPTION)}
    results: Results = {}
    for name, lengths in per_row.items():
        padding = T - sum(lengths)
        row = (*lengths, padding) if padding else lengths
        mask = DocumentMask(row * n_rows, n_rows, T, bench.device, (padding,) * n_rows)
        shape = n_rows, T, s.n_heads, 64
        q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
        forward = 4 * 64 * s.n_heads * n_rows * sum(n * n for n in lengths) / 2
        variants: dict[str, Callable[[], Tensor]] = {
            kernel: partial(_attend, q, k, v, mask, kernel) for kernel in ("xformers", "flex", "sdpa")
        }
        if name == "one document":
            backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if bench.on_gpu else (SDPBackend.MATH,)
            variants |= {f"torch {b.name.lower()}, is_causal": partial(_causal, q, k, v, b) for b in backends}
        if bench.tiny:
            variants["reference"] = partial(attend, q, k, v, mask, kernel="reference")
        results[name] = attempts(
            {kernel: partial(_attention, bench, act, (q, k, v), gradient, forward) for kernel, act in variants.items()}
        )
    return results


def _documents(row: int) -> tuple[int, ...]:
    """Return the lengths of documents that fill a row, as varied as those of text and pages."""
    shares = (5, 11, 3, 29, 7, 17, 2, 23)
    cuts = [row * share // sum(shares) for share in shares]
    return (*cuts[:-1], row - sum(cuts[:-1]))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, kernel: str) -> Tensor:
    check_kernel(kernel, q.device, q.dtype, q.shape[-1], 0.0)
    return attend(q, k, v, mask, kernel=kernel)


def _causal(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def _attention(bench: Bench, act: Callable[[], Tensor], qkv: Sequence[Tensor], gradient: Tensor, forward: float) -> Results:
    with torch.no_grad():
        seconds = bench.seconds(act)
    both = bench.seconds(lambda: torch.autograd.grad(act(), qkv, gradient))  # leaves .grad alone: no accumulation is timed
    return {
        "forward, ms": 1000 * seconds, "both, ms": 1000 * both, "forward, TFLOP/s": forward / seconds / 1e12,
        "both, TFLOP/s": 3.5 * forward / both / 1e12,
    }  # fmt: skip


# ---- one block


BLOCKS: dict[str, dict[str, object]] = {
    "plain": {"norm": "pre", "positions": "learned", "dropout_rate": 0.0},
    "dropout 0.1": {"norm": "pre", "positions": "learned", "dropout_rate": 0.1},
    "xPos": {"norm": "pre", "positions": "xpos", "dropout_rate": 0.0},
    "sub-LN": {"norm": "sub", "positions": "learned", "dropout_rate": 0.0},
    "all three": {"norm": "sub", "positions": "xpos", "dropout_rate": 0.1},
}
"""Options of a decoder layer beside matrices, GELU and attention."""


def block(bench: Bench) -> Results:
    """One compiled layer forward and backward on rows of one document, with each option of `BLOCKS`."""
    s, n_rows = bench.sizes, bench.sizes.rows[0]
    shape = n_rows, s.seq_len, s.dim
    mask = DocumentMask((s.seq_len,) * n_rows, n_rows, s.seq_len, bench.device)
    positions = torch.arange(s.seq_len, device=bench.device).expand(n_rows, -1)
    turn = rotation(xpos_tables(s.seq_len, s.head_dim).to(bench.device), positions)
    x = torch.randn(shape, device=bench.device, requires_grad=True)  # the residual stream is float32
    gradient = torch.randn(shape, device=bench.device)
    acts = {}
    for name, fields in BLOCKS.items():
        config = bench.config(**fields).decoder
        layer = Block(config).to(bench.device).train()
        if bench.use_compile:
            layer.compile_parts()
        rotation_ = turn if config.positions == "xpos" else None
        acts[name] = partial(_layer, bench, layer, x, mask, rotation_, gradient)
    seconds = bench.alternating(acts)
    tokens = n_rows * s.seq_len
    return {
        name: {"ms": 1000 * median, "tokens/s": tokens / median, "of plain": seconds["plain"] / median}
        for name, median in seconds.items()
    }


def _layer(bench: Bench, layer: Block, x: Tensor, mask: DocumentMask, turn: object, gradient: Tensor) -> None:
    with bench.autocast():
        out = layer(x, mask, turn)
    out.backward(gradient)
    drop_gradients(layer)
    x.grad = None


# ---- vocabulary projection and loss


def head(bench: Bench) -> Results:
    """Projection to the vocabulary and cross-entropy, forward and backward, with their peak memory."""
    s = bench.sizes
    S = s.rows[0] * s.seq_len
    hidden = torch.randn(S, s.dim, device=bench.device, requires_grad=True)  # float32, as the last LayerNorm leaves it
    matrix = (0.02 * torch.randn(s.vocab, s.dim, device=bench.device)).requires_grad_()
    targets = torch.randint(0, s.vocab, (S,), device=bench.device)
    flops = 3 * 2 * S * s.dim * s.vocab
    chunks = (S // 4, S // 8)
    variants: dict[str, Callable[[], Tensor]] = {
        "eager, float32 logits": partial(_plain_loss, hidden, matrix, targets),
        "compiled": partial(bench.compiled(_plain_loss), hidden, matrix, targets),
    }
    for chunk in chunks:
        variants[f"gradients in chunks of {chunk}"] = partial(_chunked_loss, hidden, matrix, targets, chunk, None)
        variants[f"gradients in chunks of {chunk}, compiled"] = partial(
            _chunked_loss, hidden, matrix, targets, chunk, Graphs() if bench.use_compile else None
        )
    return attempts({name: partial(_loss, bench, act, hidden, matrix, flops) for name, act in variants.items()})


def _plain_loss(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, matrix).float(), targets)


def _chunked_loss(hidden: Tensor, matrix: Tensor, targets: Tensor, chunk: int, compiler: Graphs | None) -> Tensor:
    return weighted_nll(hidden, matrix, targets, 1 / len(targets), chunk, compiler=compiler)[0]


def _loss(bench: Bench, act: Callable[[], Tensor], hidden: Tensor, matrix: Tensor, flops: float) -> Results:
    def both() -> None:
        with bench.autocast():
            loss = act()
        loss.backward()  # type: ignore[no-untyped-call]
        hidden.grad = matrix.grad = None

    seconds = bench.seconds(both)
    return {"ms": 1000 * seconds, "of MM": flops / seconds / bench.matmul_rate, "peak bytes": bench.peak_bytes(both)}


# ---- CLIP


def clip(bench: Bench) -> Results:
    """The frozen tower forward in calls of several sizes, plain and compiled, and transformers' CLIP."""
    operations = ModelFlops(bench.config()).forward(Work(n_images=1)).vision
    transformers_clip = _transformers_clip(bench)
    variants: dict[str, Callable[[], Results]] = {}
    side = bench.sizes.image_size
    for n in bench.sizes.image_chunks:
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=bench.device)
        pixels = torch.randn(images.shape, dtype=torch.bfloat16, device=bench.device)
        plain, fused = (
            VisionTower(replace(bench.config().vision, chunk=n, trainable="none")).to(bench.device, torch.bfloat16)
            for _ in range(2)
        )
        if bench.use_compile:
            fused.compile_blocks()
        measure = partial(_images, bench, n, operations)
        variants[f"kosmos-lit, {n}"] = partial(measure, partial(plain, images))
        variants[f"kosmos-lit compiled, {n}"] = partial(measure, partial(fused, images))
        variants[f"transformers, {n}"] = partial(measure, partial(transformers_clip, pixels))
    return attempts(variants)


def _images(bench: Bench, n: int, operations: float, act: Callable[[], object]) -> Results:
    seconds = bench.seconds(act)  # a frozen tower keeps no graph, so no_grad would change nothing
    return {"ms": 1000 * seconds, "images/s": n / seconds, "of MM": n * operations / seconds / bench.matmul_rate}


def _transformers_clip(bench: Bench) -> Callable[[Tensor], object]:
    """Return transformers' tower of the same shape, eager, with scaled_dot_product_attention."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from kosmos_lit.weights.towers import tower_sizes

    sizes = tower_sizes(bench.config().vision)
    assert sizes is not None
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=bench.sizes.image_size, attn_implementation="sdpa"))
    return model.to(bench.device, torch.bfloat16).eval().requires_grad_(False)  # type: ignore[no-any-return,arg-type]


# ---- steps of text


def text_steps(bench: Bench) -> Results:
    """Training steps on rows of one text each, in micro-batches of two sizes, with their peak memory."""
    config = bench.config()
    model = bench.model(config)
    variants: dict[str, Callable[[], Results]] = {}
    for n_rows in bench.sizes.rows:
        variants[f"{n_rows * bench.sizes.seq_len} positions"] = partial(_text_step, bench, config, model, n_rows)
    return attempts(variants)


def _text_step(bench: Bench, config: KosmosConfig, model: Kosmos, n_rows: int) -> Results:
    batch = bench.batch({"text": n_rows})
    step = TrainStep(bench, model, batch)
    results = bench.work(config, batch, bench.seconds(step, min(bench.n_steps, 10)))
    return results | {"peak bytes": bench.peak_bytes(step)}


COMPONENTS: dict[str, Callable[[Bench], Results]] = {
    "rates": rates, "xformers": xformers_info, "attention": attention, "block": block, "head": head, "clip": clip,
    "text steps": text_steps,
}  # fmt: skip
"""Every component, in the order in which they run."""
