"""Goals G1 to G11 of speed: what is measured for each, and what it has to reach. Both sides of a ratio in one run.

MM is the rate of a large bf16 product in the same run. Published figures (G3) are of 8 GPUs with communication, ours is of
one without: said wherever they stand side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import data as loader_benchmark
from benchmarks import generation, images, loop
from benchmarks.data_made import make
from benchmarks.data_sides import rendering
from benchmarks.gpu import parts
from benchmarks.gpu.reference import check_agreement, reference_rate
from benchmarks.gpu.rig import SHARES, STEP_TOKENS, Figures, Rig, TrainStep, attempts, measured
from datamodules.loader import BatchLayout, Loader, MicroBatches
from kosmos_lit.config import KosmosConfig
from kosmos_lit.model import Kosmos
from kosmos_lit.weights import to_transformers

PUBLISHED = {"MPT-1.3B": 419.0, "llm.c GPT-2 1.56B": 482.0, "nanochat d24": 494.0}
"""TFLOP/s a GPU with full attention counted: 8 H100 each. llm-foundry's benchmarking README; llm.c's run_gpt2_1558M.sh;
nanochat's leaderboard, run 1."""
IMAGES_NEEDED = 550.0
"""Images a second that feed one GPU, with half as much to spare."""


def bar(value: float, accept: float, stretch: float, *, at_most: bool = False) -> Figures:
    """Return the verdict on one figure; `share` is how much of what is asked for it reaches."""
    share = accept / value if at_most and value else value / accept
    reached = value <= accept if at_most else value >= accept
    return {
        "value": value, "at most" if at_most else "at least": accept, "stretch": stretch, "share": share,
        "verdict": "reached" if reached else f"missed: {share:.2f} of the bar",
    }  # fmt: skip


def _step_of(rig: Rig, shares: dict[str, int], **decoder: Any) -> tuple[KosmosConfig, TrainStep]:
    config = rig.config(**decoder)
    return config, TrainStep(rig, rig.model(config), rig.batch(shares))


def _train(rig: Rig, shares: dict[str, int], **decoder: Any) -> Figures:
    config, step = _step_of(rig, shares, **decoder)
    figures = rig.work(config, step.batch, rig.seconds(step))
    return figures | {"peak bytes": rig.peak_bytes(step)}


def _best(found: dict[str, Figures], figure: str) -> float:
    """Return the largest of a figure over the sides that have it.

    Raises: RuntimeError with every side's reason if none has.
    """
    values = measured(found, figure)
    if not values:
        raise RuntimeError("; ".join(f"{name}: {side.get('error')}" for name, side in found.items()))
    return max(values.values())


def g1(rig: Rig) -> Figures:
    """Rows of text without dropout, by each attention kernel, and with fp8 matrices."""
    text = {"text": rig.sizes.rows[0]}
    kernels = ("auto", "flex", "sdpa") if rig.on_gpu else ("auto",)
    found = attempts({kernel: partial(_train, rig, text, attention_kernel=kernel) for kernel in kernels})
    fp8 = attempts({"fp8": partial(_train, rig, text, fp8=True)}) if rig.on_gpu else {}
    bars = {"model TFLOP/s over MM": bar(_best(found, "of MM"), 0.63, 0.68)}
    if "of MM" in fp8.get("fp8", {}):
        bars["the same with fp8"] = bar(fp8["fp8"]["of MM"], 0.80, 0.80)
    return {"bars": bars, "sides": found | fp8}


def g2(rig: Rig) -> Figures:
    """The three corpora at 5 : 5 : 2, images seen, latents and loss positions as they are."""
    shares = {kind: n * rig.sizes.mixture for kind, n in SHARES.items()}
    found = _train(rig, shares)
    of_step = STEP_TOKENS / found["tokens/s"]
    return {"bars": {"model TFLOP/s over MM": bar(found["of MM"], 0.60, 0.68)}, **found, "seconds of 1.2 M tokens": of_step}


def g3(rig: Rig) -> Figures:
    """Beside public figures at about this size, with full attention counted as theirs are."""
    ours = _best(rig.found["G1"]["sides"], "TFLOP/s, full attention")
    asked = {"MPT-1.3B": (1.2, 1.35), "llm.c GPT-2 1.56B": (1.08, 1.18), "nanochat d24": (1.05, 1.15)}
    bars = {name: bar(ours / PUBLISHED[name], *ratios) for name, ratios in asked.items()}
    return {"bars": bars, "note": "theirs: 8 H100 with communication; ours: one GPU without"}


def g4(rig: Rig) -> Figures:
    """Beside a loop written like the released one."""
    bars, sides = {}, {}
    model = rig.model(rig.config(), fused=False)
    for kind, asked in {"text": (1.8, 2.2), "caption": (5.0, 10.0)}.items():
        off = check_agreement(rig, model, kind)
        theirs = reference_rate(rig, model, kind) | {"loss off by": off}
        ours = _train(rig, {kind: rig.sizes.rows[0]})
        sides[kind] = {"reference": theirs, "ours": ours}
        bars[f"{kind}, tokens/s"] = bar(ours["tokens/s"] / theirs["tokens/s"], *asked)
    return {"bars": bars, "sides": sides}


def g5(rig: Rig) -> Figures:
    """What residual dropout, xPos and sub-LN cost one compiled layer; the vocabulary would only dilute it."""
    asked = {"dropout 0.1": (0.97, 0.99), "xPos": (0.98, 0.99), "sub-LN": (0.97, 0.98), "all three": (0.93, 0.96)}
    found = rig.found["block"]
    return {"bars": {name: bar(found[name]["of plain"], *ratios) for name, ratios in asked.items()}}


def g6(rig: Rig) -> Figures:
    """The best attention kernel forward and backward, beside FlashAttention-2 as xformers runs it."""
    bars = {}
    asked = {"one document": (1.3, 1.6), "documents": (1.0, 1.3), "captions": (1.0, 1.3)}
    for name, ratios in asked.items():
        times = measured(rig.found["attention"][name], "both, ms")
        usual = times.get("xformers" if rig.on_gpu else "sdpa")
        if usual is None:
            raise RuntimeError(f"{name}: xformers was not measured: {rig.found['attention'][name]['xformers'].get('error')}")
        bars[f"{name}, fastest: {min(times, key=times.__getitem__)}"] = bar(usual / min(times.values()), *ratios)
    return {"bars": bars}


def g7(rig: Rig) -> Figures:
    """Vocabulary projection and loss: the fastest way that holds little memory."""
    found = rig.found["head"]
    eager = found["eager, float32 logits"].get("peak bytes")
    ours = {name: side for name, side in found.items() if name.startswith("gradients in chunks") and "of MM" in side}
    name, best = max(ours.items(), key=lambda item: item[1]["of MM"])
    bars = {f"rate over MM: {name}": bar(best["of MM"], 0.75, 0.85)}
    if eager and best["peak bytes"] is not None:
        bars["memory beside eager float32 logits"] = bar(best["peak bytes"] / eager, 0.15, 0.08, at_most=True)
    return {"bars": bars}


def g8(rig: Rig) -> Figures:
    """CLIP's forward pass, beside transformers' with scaled_dot_product_attention."""
    found = rig.found["clip"]
    ours = _best({name: side for name, side in found.items() if name.startswith("ours")}, "of MM")
    ours_rate = _best({name: side for name, side in found.items() if name.startswith("ours")}, "images/s")
    theirs = _best({name: side for name, side in found.items() if name.startswith("transformers")}, "images/s")
    return {"bars": {"over MM": bar(ours, 0.65, 0.75), "over transformers": bar(ours_rate / theirs, 1.25, 1.5)}}


def g9(rig: Rig) -> Figures:
    """The loader on four processes, how long training waits for it, how it decodes, and how full its rows are."""
    workers = 0 if rig.tiny else 4
    n_pairs, n_texts, n_documents = (2, 61, 256) if rig.tiny else (1024, 4000, 1024)
    with tempfile.TemporaryDirectory() as folder:
        inputs = make(Path(folder), n_pairs, n_texts, n_documents, 311 if rig.tiny else 2000)
        data = inputs.data("256 px")
        ours, *others = loader_benchmark.compare(inputs, "256 px", workers, 4 if rig.tiny else 200, 1 if rig.tiny else 3)
        totals = data.prepared["caption"].train.plan.totals
        padding = 1 - totals.positions / (totals.rows * data.seq_len)
        wait = _data_wait(rig, data, workers)
    jpegs = [images.made(256, 256, 95, seed) for seed in range(4 if rig.tiny else 24)]
    decoding = images.compare("256 x 256", jpegs, 1 if rig.tiny else 9)
    bars = {
        "images/s": bar(float(ours["images/s"]), IMAGES_NEEDED, 2 * IMAGES_NEEDED),  # type: ignore[arg-type]
        "share of time that training waits": bar(wait, 0.01, 0.003, at_most=True),
        "decoding over Pillow": bar(float(decoding["ratio"]), 2.0, 3.0),  # type: ignore[arg-type]
        "padding of captions": bar(padding, 0.01, 0.003, at_most=True),
    }
    return {"bars": bars, "others": others, "decoding": decoding}


def _data_wait(rig: Rig, data: Any, workers: int) -> float:
    """Return the share of the time of training on captions that is spent waiting for their loader."""
    n_rows = 1 if rig.tiny else rig.sizes.rows[0]
    share = BatchLayout(first_row=0, global_batch_rows=n_rows, micro_batch_rows=n_rows)
    loader = Loader(MicroBatches(data.stream(), share, rendering(data)), workers)
    config = rig.config(max_seq_len=data.seq_len)
    model, step = rig.model(config), None
    begun = waited = 0.0
    n_steps, n_warm_up = rig.n_steps, rig.n_warm_up
    for number, batch in zip(range(n_steps + n_warm_up), loader, strict=False):
        if number == n_warm_up:
            begun, waited = loop.now(rig.device)[0], loader.waited_seconds
        step = step or TrainStep(rig, model, batch)
        step.batch = batch.to(rig.device)
        step()
    return (loader.waited_seconds - waited) / (loop.now(rig.device)[0] - begun)


def g10(rig: Rig) -> Figures:
    """Decoding in bf16, beside what memory's rate allows and beside transformers' plain loop with a growing cache."""
    model = generation.make_model("tiny" if rig.tiny else "kosmos1").to(rig.device, torch.bfloat16)
    other = to_transformers(model).to(rig.device)
    c, n_new = model.config.decoder, rig.sizes.new_tokens
    weights = sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    kv = 2 * c.n_layers * c.dim * 2  # bytes of a position's keys and values
    bars, sides = {}, {}
    for n_prompts, asked in {1: (0.55, 0.75), 64: (0.5, 0.65)}.items():
        prompts, images = generation.make_prompts(2 if rig.tiny and n_prompts > 1 else n_prompts)
        images = images.to(rig.device)
        n = len(prompts)
        rates = {}
        for name, side in {"ours": _ours, "theirs": _theirs}.items():
            written = partial(side, model if name == "ours" else other, prompts, images)
            # What comes before the first new token, images and prompt, falls away in the difference of two lengths.
            long, short = (rig.seconds(partial(written, length), 3) for length in (n_new, max(1, n_new // 4)))
            rates[name] = n * (n_new - max(1, n_new // 4)) / max(long - short, 1e-9)
        context = len(prompts[0].tokens) + n_new * 5 / 8  # the mean of what the counted tokens look back on
        bound = n * rig.copy_rate / (weights + n * kv * context)
        sides[n_prompts] = {"tokens/s": rates, "bound, tokens/s": bound}
        bars[f"batch {n_prompts}, over the bound"] = bar(rates["ours"] / bound, *asked)
        bars[f"batch {n_prompts}, over the plain loop"] = bar(rates["ours"] / rates["theirs"], 4.0, 6.0)
    return {"bars": bars, "sides": sides}


def _ours(model: Kosmos, prompts: Any, images: torch.Tensor, n_new: int) -> object:
    return generation.ours(model, prompts, images, 1, n_new)


def _theirs(model: Any, prompts: Any, images: torch.Tensor, n_new: int) -> object:
    pixels = (images.to(torch.bfloat16) - 127.5) / 64
    return generation.theirs(model, prompts, pixels, 1, n_new)


def g11(rig: Rig) -> Figures:
    """Lightning's Trainer beside a bare loop, and FSDP2 on one rank beside none."""
    flags = ["--trainer.accelerator=cpu"]
    if not rig.tiny:
        s = rig.sizes
        flags = [
            "--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed", f"--model.kosmos.decoder.dim={s.dim}",
            f"--model.kosmos.decoder.n_layers={s.n_layers}", f"--model.kosmos.decoder.n_heads={s.n_heads}",
            f"--model.kosmos.decoder.ffn_dim={4 * s.dim}", f"--model.kosmos.decoder.vocab_size={s.vocab}",
            "--data.global_batch_rows=128", "--data.micro_batch_rows=128",
        ]  # fmt: skip
    sides = {"Trainer": loop.TRAINERS["every 10 steps"]}
    if rig.on_gpu:
        sides["FSDP2"] = ["-c", "configs/trainer/fsdp.yaml", "--trainer.devices=1", *sides["Trainer"]]
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Loop(flags, Path(folder), rig.n_steps)
        lines = {str(line["side"]): line for line in loop.compare(run, 1 if rig.tiny else 2, sides)}
    bars = {"Trainer over a bare loop": bar(lines["Trainer"]["clock ratio"], 0.99, 0.995)}
    if "FSDP2" in lines:
        ratio = lines["Trainer"]["clock ms a step"] / lines["FSDP2"]["clock ms a step"]
        bars["FSDP2 on one rank over none"] = bar(ratio, 0.98, 0.99)
    return {"bars": bars, "sides": lines}


GOALS: dict[str, tuple[Callable[[Rig], Figures], tuple[str, ...]]] = {
    "G1": (g1, ()), "G2": (g2, ()), "G3": (g3, ("G1",)), "G4": (g4, ()), "G5": (g5, ("block",)), "G6": (g6, ("attention",)),
    "G7": (g7, ("head",)), "G8": (g8, ("clip",)), "G9": (g9, ()), "G10": (g10, ()), "G11": (g11, ()),
}  # fmt: skip
"""How each is measured, and the parts that it reads."""


def profiled(rig: Rig, part: str) -> Callable[[], object]:
    """Return what a profile of a part or goal runs."""
    match part:
        case "G1" | "G3" | "G4" | "text steps":
            return _step_of(rig, {"text": rig.sizes.rows[0]})[1]
        case "G2":
            return _step_of(rig, {kind: n * rig.sizes.mixture for kind, n in SHARES.items()})[1]
        case "G10":
            model = generation.make_model("tiny" if rig.tiny else "kosmos1").to(rig.device, torch.bfloat16)
            prompts, images = generation.make_prompts(1)
            return partial(_ours, model, prompts, images.to(rig.device), rig.sizes.new_tokens)
    measure = {"G5": "block", "G6": "attention", "G7": "head", "G8": "clip"}.get(part, part)
    if measure in parts.PARTS:
        return partial(parts.PARTS[measure], rig)
    return partial(GOALS[part][0], rig)
