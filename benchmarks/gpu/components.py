"""Components of a step: rates, the loss, CLIP, attention, a decoder layer; with the goals that each has.

Random data (zeros draw less power and would flatter); medians of 20 after a warm-up. Attention counts as 4 K operations per
head and pair of positions forward, and 2.5 times that backward, in the causal half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench, Results, best, drop_gradients, measured, verdict
from kosmos_lit.config import Kernel
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.layers.block import Block
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.graphs import Graphs
from kosmos_lit.ops.kernels import check_kernel
from kosmos_lit.ops.losses import weighted_nll
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.ops.positions import rotation, xpos_tables
from kosmos_lit.vision import VisionTower

CAPTION = 84
"""Positions of a typical caption pair."""
KERNELS = tuple(kernel for kernel in get_args(Kernel) if kernel not in ("auto", "reference"))
"""Attention kernels that a run can choose."""


def rates(bench: Bench) -> Results:
    """Measure the yardsticks: a large matrix product and a copy; and see whether xformers' attention runs."""
    n = bench.sizes.matmul
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bench.matmul_rate = 2 * n**3 / bench.seconds(lambda: torch.mm(a, b, out=out), 50 if bench.on_gpu else None)
    source = torch.randint(0, 256, (bench.sizes.copy_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.copy_rate = 2 * source.numel() / bench.seconds(lambda: target.copy_(source))
    q = torch.randn(1, 128, 2, 64, device=bench.device, dtype=torch.bfloat16)
    mask = DocumentMask((64, 64), 1, 128, bench.device)
    runs = bench.attempts({"xformers": lambda: {"shape": list(attend(q, q, q, mask, kernel="xformers").shape)}})
    return {"product of side": n, "copy of bytes": source.numel()} | runs


# ---- attention


ATTENTION = {"one document": (1.3, 1.6), "documents": (1.0, 1.3), "captions": (1.0, 1.3)}
"""Thresholds of the fastest kernel over FlashAttention-2 as xformers runs it."""


def attention(bench: Bench) -> Results:
    """Measure heads of 64 forward and backward: rows of one document, packed documents, and packed captions."""
    s, T = bench.sizes, bench.sizes.seq_len
    n_rows = 1 if bench.tiny else 8192 // T
    per_row = {"one document": (T,), "documents": _documents(T), "captions": (CAPTION,) * (T // CAPTION)}
    results: Results = {}
    verdicts: Results = {}
    for name, lengths in per_row.items():
        padding = T - sum(lengths)
        row = (*lengths, padding) if padding else lengths
        mask = DocumentMask(row * n_rows, n_rows, T, bench.device, (padding,) * n_rows)
        shape = n_rows, T, s.n_heads, 64
        q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
        forward = 4 * 64 * s.n_heads * n_rows * sum(n * n for n in lengths) / 2
        variants: dict[str, Callable[[], Tensor]] = {k_: partial(_attend, q, k, v, mask, k_) for k_ in KERNELS}
        if name == "one document":
            backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if bench.on_gpu else (SDPBackend.MATH,)
            variants |= {f"torch {b.name.lower()}, is_causal": partial(_causal, q, k, v, b) for b in backends}
        if bench.tiny:
            variants["reference"] = partial(attend, q, k, v, mask, kernel="reference")
        results[name] = bench.attempts(
            {kernel: partial(_attention, bench, act, (q, k, v), gradient, forward) for kernel, act in variants.items()}
        )
        times = measured(results[name], "both, ms")
        if (usual := times.get("xformers" if bench.on_gpu else "sdpa")) is not None:
            fastest = min(times, key=times.__getitem__)
            verdicts[f"{name}, fastest: {fastest}"] = verdict(usual / times[fastest], *ATTENTION[name])
        bench.report({"verdicts": verdicts, **results})
    return {"verdicts": verdicts, **results}


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
        "forward, ms": 1000 * seconds,
        "both, ms": 1000 * both,
        "forward, TFLOP/s": forward / seconds / 1e12,
        "both, TFLOP/s": 3.5 * forward / both / 1e12,
    }


# ---- one block


BLOCKS: dict[str, dict[str, object]] = {
    "plain": {"norm": "pre", "positions": "learned", "dropout_rate": 0.0},
    "dropout 0.1": {"norm": "pre", "positions": "learned", "dropout_rate": 0.1},
    "xPos": {"norm": "pre", "positions": "xpos", "dropout_rate": 0.0},
    "sub-LN": {"norm": "sub", "positions": "learned", "dropout_rate": 0.0},
    "all three": {"norm": "sub", "positions": "xpos", "dropout_rate": 0.1},
}
"""Options of a decoder layer beside matrices, GELU and attention."""
OPTIONS = {"dropout 0.1": (0.97, 0.99), "xPos": (0.98, 0.99), "sub-LN": (0.97, 0.98), "all three": (0.93, 0.96)}
"""Thresholds of the speed with an option over the speed without."""


def block(bench: Bench) -> Results:
    """Measure one compiled layer forward and backward on rows of one document, with each option of `BLOCKS`."""
    bench.drop_model()  # torch.compile allows some eight variants of a layer, and the model has some of them
    s, n_rows = bench.sizes, bench.sizes.rows
    shape = n_rows, s.seq_len, s.dim
    mask = DocumentMask((s.seq_len,) * n_rows, n_rows, s.seq_len, bench.device)
    positions = torch.arange(s.seq_len, device=bench.device).expand(n_rows, -1)
    turn = rotation(xpos_tables(s.seq_len, s.head_dim).to(bench.device), positions)
    x = torch.randn(shape, device=bench.device, requires_grad=True)  # the residual stream is float32
    gradient = torch.randn(shape, device=bench.device)
    acts = {}
    for name, fields in BLOCKS.items():
        config = bench.config(**fields).decoder
        with bench.device:
            layer = Block(config).train()
        if bench.use_compile:
            layer.compile_parts()
        rotation_ = turn if config.positions == "xpos" else None
        acts[name] = partial(_layer, bench, layer, x, mask, rotation_, gradient)
    seconds = bench.alternating(acts)
    tokens = n_rows * s.seq_len
    results = {
        name: {"ms": 1000 * median, "tokens/s": tokens / median, "of plain": seconds["plain"] / median}
        for name, median in seconds.items()
    }
    # The vocabulary would only dilute the cost.
    verdicts = {name: verdict(results[name]["of plain"], *ratios) for name, ratios in OPTIONS.items()}
    return {"verdicts": verdicts, **results} | bench.explain(acts["all three"], verdicts)


def _layer(bench: Bench, layer: Block, x: Tensor, mask: DocumentMask, turn: object, gradient: Tensor) -> None:
    with bench.autocast():
        out = layer(x, mask, turn)
    out.backward(gradient)
    drop_gradients(layer)
    x.grad = None


# ---- vocabulary projection and loss


def loss(bench: Bench) -> Results:
    """Measure projection to the vocabulary and cross-entropy, forward and backward, with their peak memory."""
    s = bench.sizes
    S = s.rows * s.seq_len
    hidden = torch.randn(S, s.dim, device=bench.device, requires_grad=True)  # float32, as the last LayerNorm leaves it
    matrix = (0.02 * torch.randn(s.vocab, s.dim, device=bench.device)).requires_grad_()
    targets = torch.randint(0, s.vocab, (S,), device=bench.device)
    flops = 3 * 2 * S * s.dim * s.vocab
    chunks = (S // 4, S // 8)
    variants: dict[str, Callable[[], Tensor]] = {}
    for chunk in chunks:
        variants[f"gradients in chunks of {chunk}, compiled"] = partial(
            _chunked_loss, hidden, matrix, targets, chunk, Graphs() if bench.use_compile else None
        )
        variants[f"gradients in chunks of {chunk}"] = partial(_chunked_loss, hidden, matrix, targets, chunk, None)
    variants["eager, float32 logits"] = partial(_plain_loss, hidden, matrix, targets)
    variants["compiled"] = partial(bench.compiled(_plain_loss), hidden, matrix, targets)
    results = bench.attempts({name: partial(_loss, bench, act, hidden, matrix, flops) for name, act in variants.items()})
    of_matmul = measured({n: r for n, r in results.items() if n.startswith("gradients in chunks")}, "of MM")
    if not of_matmul:
        best(results, "of MM")  # raises with the reasons
    name = max(of_matmul, key=of_matmul.__getitem__)
    verdicts = {f"over MM: {name}": verdict(of_matmul[name], 0.75, 0.85)}
    eager, own = (results[key].get("peak bytes") for key in ("eager, float32 logits", name))
    if eager and own is not None:
        verdicts["memory over eager float32 logits"] = verdict(own / eager, 0.15, 0.08, at_most=True)
    profile = bench.explain(partial(_backward, bench, variants[name], hidden, matrix), verdicts)
    return {"verdicts": verdicts, "variants": results} | profile


def _plain_loss(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, matrix).float(), targets)


def _chunked_loss(hidden: Tensor, matrix: Tensor, targets: Tensor, chunk: int, compiler: Graphs | None) -> Tensor:
    return weighted_nll(hidden, matrix, targets, 1 / len(targets), chunk, compiler=compiler)[0]


def _backward(bench: Bench, act: Callable[[], Tensor], hidden: Tensor, matrix: Tensor) -> None:
    with bench.autocast():
        loss = act()
    loss.backward()  # type: ignore[no-untyped-call]
    hidden.grad = matrix.grad = None


def _loss(bench: Bench, act: Callable[[], Tensor], hidden: Tensor, matrix: Tensor, flops: float) -> Results:
    both = partial(_backward, bench, act, hidden, matrix)
    seconds = bench.seconds(both)
    return {"ms": 1000 * seconds, "of MM": flops / seconds / bench.matmul_rate, "peak bytes": bench.peak_bytes(both)}


# ---- CLIP


def clip(bench: Bench) -> Results:
    """Measure the tower forward as training has it, in calls of several sizes, compiled; and transformers' CLIP."""
    model = bench.model(bench.config())
    tower, variants = model.vision, {}
    operations = ModelFlops(model.config).forward(Work(n_images=1)).vision
    side, usual = bench.sizes.image_size, tower.config
    transformers_clip: list[Callable[[Tensor], object]] = []
    for n in bench.sizes.image_chunks:
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=bench.device)
        variants[f"kosmos-lit, {n}"] = partial(_tower, bench, tower, images, operations)
        variants[f"transformers, {n}"] = partial(_transformers_clip, bench, transformers_clip, images, operations)
    results = bench.attempts(variants)
    rates = {
        side: best({k: r for k, r in results.items() if k.startswith(side)}, "images/s")
        for side in ("kosmos-lit", "transformers")
    }
    own = rates["kosmos-lit"]
    verdicts = {
        "over MM": verdict(own * operations / bench.matmul_rate, 0.65, 0.75),
        "over transformers": verdict(own / rates["transformers"], 1.25, 1.5),
    }
    profile = bench.explain(partial(_features, bench, tower, images), verdicts)
    tower.config = usual
    return {"verdicts": verdicts, "variants": results} | profile


def _features(bench: Bench, tower: VisionTower, images: Tensor) -> None:
    with bench.autocast():
        tower(images)


def _tower(bench: Bench, tower: VisionTower, images: Tensor, operations: float) -> Results:
    torch.compiler.reset()  # of some eight variants of a block that torch allows, each size takes two
    tower.config = replace(tower.config, chunk=len(images))
    return _images(bench, partial(_features, bench, tower, images), len(images), operations)


def _transformers_clip(bench: Bench, kept: list[Callable[[Tensor], object]], images: Tensor, operations: float) -> Results:
    """Measure transformers' tower of the same shape, eager, in bfloat16, with scaled_dot_product_attention."""
    if not kept:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        from kosmos_lit.weights.towers import tower_sizes

        sizes = tower_sizes(bench.config().vision)
        assert sizes is not None
        with bench.device:
            model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=bench.sizes.image_size, attn_implementation="sdpa"))
        kept.append(model.to(torch.bfloat16).eval().requires_grad_(False))  # type: ignore[arg-type]
    pixels = torch.randn(images.shape, dtype=torch.bfloat16, device=bench.device)
    return _images(bench, partial(kept[0], pixels), len(images), operations)


def _images(bench: Bench, act: Callable[[], object], n: int, operations: float) -> Results:
    seconds = bench.seconds(act)
    return {"ms": 1000 * seconds, "images/s": n / seconds, "of MM": n * operations / seconds / bench.matmul_rate}
