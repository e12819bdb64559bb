"""The whole model: training steps on text and on the three corpora, decoding, and a loop like the released one.

Published rates are of 8 GPUs with communication, ours is of one without; every comparison of the two states so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch

from benchmarks import generation
from benchmarks.gpu.bench import Bench, Results, Shares, TrainStep, best, drawn, verdict
from benchmarks.gpu.components import KERNELS
from benchmarks.gpu.reference import check_agreement, reference_rate
from kosmos_lit import config as config_module
from kosmos_lit.config import KosmosConfig
from kosmos_lit.model import Kosmos

STEP_TOKENS = 1_200_000
"""Tokens of one step of the paper."""
PUBLISHED = {"MPT-1.3B": (419.0, 1.2, 1.35), "llm.c GPT-2 1.56B": (482.0, 1.08, 1.18), "nanochat d24": (494.0, 1.05, 1.15)}
"""TFLOP/s per GPU with full attention counted, of 8 H100 each, and thresholds: llm-foundry's benchmarking README; llm.c's
run_gpt2_1558M.sh; nanochat's leaderboard, run 1."""

SCALES = tuple(kind for kind in get_args(getattr(config_module, "Fp8", Literal[True])) if kind != "none")
"""Values of `decoder.fp8` that turn it on."""


# ---- training steps


def trained(bench: Bench, config: KosmosConfig, candidates: Sequence[Shares]) -> tuple[Results, TrainStep]:
    """Measure a step on the largest of the micro-batches that fits, and return it too, warm.

    Raises: RuntimeError if none fits.
    """
    tried: list[Any] = []
    for batch, known in bench.fitting(config, candidates):
        try:
            step = TrainStep(bench, bench.model(config), batch)
            results = bench.work(config, batch, bench.seconds(step))
            peak = bench.peak_bytes(step, beyond=False)
            return known | results | {"peak bytes": peak, "out of memory": tried}, step
        except torch.OutOfMemoryError:
            tried.append(known["rows"])
        # Here the error is gone, and with it the frames that hold the step's tensors.
        step = None
        bench.drop_model()
    raise RuntimeError(f"no micro-batch fits {bench.available_bytes() / 1e9:.1f} GB; out of memory: {tried}")


def text(bench: Bench) -> Results:
    """Measure rows of text without dropout, with the kernel that a run takes and with each other one."""
    config = bench.config()
    results, step = trained(bench, config, bench.sizes.text)
    variants = {"auto": results}
    ratio = "model TFLOP/s over MM"
    verdicts = {ratio: verdict(results["of MM"], 0.63, 0.68)}
    bench.report({"verdicts": verdicts, "variants": variants})
    profile = bench.explain(step, verdicts)
    variants |= bench.attempts({kernel: partial(_with_kernel, bench, step, kernel) for kernel in KERNELS})
    verdicts[ratio] = verdict(best(variants, "of MM"), 0.63, 0.68)
    for name, (rate, accept, goal) in PUBLISHED.items():
        verdicts[f"over {name}"] = verdict(best(variants, "TFLOP/s, full attention") / rate, accept, goal)
    note = "published: 8 H100 with communication; measured: one GPU without"
    return {"verdicts": verdicts, "variants": variants, "note": note} | profile


def _with_kernel(bench: Bench, step: TrainStep, kernel: str) -> Results:
    layers = step.model.decoder.layers
    usual = layers[0].self_attn.kernel
    try:
        for layer in layers:
            layer.self_attn.kernel = kernel
        return bench.work(step.model.config, step.batch, bench.seconds(step, min(bench.n_steps, 6)))
    finally:
        for layer in layers:
            layer.self_attn.kernel = usual


def fp8(bench: Bench) -> Results:
    """Measure rows of text with the layers' matrices in 8 bits."""
    if not bench.on_gpu:
        return {"skipped": "products in 8 bits need a GPU"}
    variants = bench.attempts({str(scales): partial(_in_8_bits, bench, scales) for scales in SCALES})
    return {"verdicts": {"model TFLOP/s over MM": verdict(best(variants, "of MM"), 0.80, 0.90)}, "variants": variants}


def _in_8_bits(bench: Bench, scales: Any) -> Results:
    results, step = trained(bench, bench.config(fp8=scales), bench.sizes.text)
    return results | bench.explain(step, {"": verdict(results["of MM"], 0.80, 0.90)})


def mixture(bench: Bench) -> Results:
    """Measure the three corpora, with their images, latents and loss positions."""
    results, step = trained(bench, bench.config(), bench.sizes.mixture)
    verdicts = {"model TFLOP/s over MM": verdict(results["of MM"], 0.60, 0.68)}
    whole = {"seconds of 1.2 M tokens": STEP_TOKENS / results["tokens/s"]}
    return {"verdicts": verdicts, **results, **whole} | bench.explain(step, verdicts)


def released(bench: Bench) -> Results:
    """Compare with a training loop written like the released one."""
    verdicts: Results = {}
    variants: dict[str, Results] = {}
    for kind, ratios in {"text": (1.8, 2.2), "caption": (5.0, 10.0)}.items():
        model = bench.model(bench.config(), fused=False)
        difference = check_agreement(bench, model, kind)
        reference = reference_rate(bench, model, kind) | {"loss off by": difference}
        model = None
        packed, _ = trained(bench, bench.config(), [{kind: n} for n in (bench.sizes.rows, max(1, bench.sizes.rows // 4))])
        variants[kind] = {"reference": reference, "kosmos-lit": packed}
        verdicts[f"{kind}, tokens/s"] = verdict(packed["tokens/s"] / reference["tokens/s"], *ratios)
        bench.report({"verdicts": verdicts, "variants": variants})
    return {"verdicts": verdicts, "variants": variants}


# ---- generation


def decode(bench: Bench) -> Results:
    """Measure decoding in bf16 over the memory's bound, and over transformers' plain loop with a growing cache."""
    bench.drop_model()
    config = generation.model_config("tiny" if bench.tiny else "kosmos1")
    model = generation.prepare(drawn(config, bench.device)).to(torch.bfloat16)
    c, n_new = model.config.decoder, bench.sizes.new_tokens
    weights = sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    kv = 2 * c.n_layers * c.dim * 2  # bytes of a position's keys and values
    verdicts: Results = {}
    variants: dict[int, Results] = {}
    for n_prompts, ratios in {1: (0.55, 0.75), 64: (0.5, 0.65)}.items():
        prompts, images = generation.make_prompts(2 if bench.tiny and n_prompts > 1 else n_prompts)
        images = images.to(bench.device)
        rate = _decoding_rate(bench, partial(_generate, model, prompts, images), len(prompts))
        context = len(prompts[0].tokens) + n_new * 5 / 8  # the mean over the counted tokens
        bound = len(prompts) * bench.copy_rate / (weights + len(prompts) * kv * context)
        variants[n_prompts] = {"tokens/s": rate, "bound, tokens/s": bound}
        verdicts[f"batch {n_prompts}, over the bound"] = verdict(rate / bound, *ratios)
        bench.report({"verdicts": verdicts, "variants": variants})
    prompts, images = generation.make_prompts(1)
    short = partial(_generate, model, prompts, images.to(bench.device), max(1, n_new // 4))
    profile = bench.explain(short, verdicts)
    loop = bench.attempts({"transformers": partial(_transformers_rate, bench, model)})["transformers"]
    if "tokens/s" in loop:
        verdicts["batch 1, over transformers' loop"] = verdict(variants[1]["tokens/s"] / loop["tokens/s"], 4.0, 6.0)
    return {"verdicts": verdicts, "variants": variants, "transformers, batch 1": loop} | profile


def _transformers_rate(bench: Bench, model: Kosmos) -> Results:
    from kosmos_lit.weights.kosmos2 import to_transformers

    other = to_transformers(model).to(bench.device)  # type: ignore[arg-type]
    prompts, images = generation.make_prompts(1)
    generate = partial(_generate_transformers, other, prompts, images.to(bench.device))
    return {"tokens/s": _decoding_rate(bench, generate, 1)}


def _decoding_rate(bench: Bench, generate: Callable[[int], object], n: int) -> float:
    """Return tokens a second of n prompts; the difference of two lengths cancels the prefill of images and prompt."""
    n_new = bench.sizes.new_tokens
    few = max(1, n_new // 4)
    long, short = (bench.seconds(partial(generate, length), 3) for length in (n_new, few))
    return n * (n_new - few) / max(long - short, 1e-9)


def _generate(model: Kosmos, prompts: Any, images: torch.Tensor, n_new: int) -> object:
    return generation.generate(model, prompts, images, 1, n_new)


def _generate_transformers(model: Any, prompts: Any, images: torch.Tensor, n_new: int) -> object:
    pixels = (images.to(torch.bfloat16) - 127.5) / 64
    return generation.generate_reference(model, prompts, pixels, 1, n_new)
