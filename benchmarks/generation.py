"""Tokens per second of kosmos-lit and of transformers, for the same weights and prompts, in one run on a CPU.

    python benchmarks/generation.py [--size small] [--runs 5] [--new-tokens 64] [--threads N] [--batch 1 8] [--beams 1 5]

A model with random weights is exported to transformers' Kosmos-2. Each prompt is an image and some text, all different and
of one length, so that neither side computes padding. Both sides generate the same number of tokens, encode the images
themselves, and forbid nothing. Runs alternate between the two. Results are medians over the runs, by wall clock and, as a
machine may have other load, by CPU time. The tokens of both sides must be equal, or the run fails.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kosmos_lit.checks.device import describe_device
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, SpecialTokens, expand_images
from kosmos_lit.weights.kosmos2 import to_transformers

VOCAB = 65_037
N_LATENTS, SIDE, N_WORDS = 64, 112, 33
SIZES = {"tiny": (256, 4), "small": (512, 8), "medium": (768, 12), "large": (1024, 24), "kosmos1": (2048, 24)}
"""Width and layers; heads are 64 wide (32 in `tiny`), as in the paper."""
SPECIAL = SpecialTokens.for_pieces(64_000)


def model_config(size: str) -> KosmosConfig:
    """Return a model that transformers can express."""
    dim, n_layers = SIZES[size]
    n_heads = dim // (32 if size == "tiny" else 64)
    tower = {"image_size": SIDE, "patch_size": 14, "width": 192, "layers": 4, "head_width": 64}
    return KosmosConfig(
        vision=VisionConfig(
            architecture={"embed_dim": 192, "vision_cfg": tower, "quick_gelu": True}, pretrained=None, image_size=SIDE
        ),
        connector=ConnectorConfig(n_latents=N_LATENTS, n_heads=n_heads),
        decoder=DecoderConfig(
            vocab_size=VOCAB, dim=dim, n_layers=n_layers, n_heads=n_heads, ffn_dim=4 * dim, positions="sinusoidal"
        ),
    )


def prepare(model: Kosmos) -> Kosmos:
    """Return a fresh model for generation: tied to its input, it would only repeat its last token."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.self_attn.out_proj.weight *= 9
            layer.ffn.fc2.weight *= 9
    return model.eval()


def make_prompts(n: int) -> tuple[list[Prompt], torch.Tensor]:
    """Return n prompts of one length and their images, (n, 3, H, W) uint8."""
    draw = np.random.default_rng(n)
    prompts = []
    for _ in range(n):
        ids = np.array([BOS, SPECIAL.image, *draw.integers(4, SPECIAL.mask, N_WORDS)])
        tokens, _, slots = expand_images(ids, SPECIAL, N_LATENTS)
        prompts.append(Prompt(tokens, slots))
    return prompts, torch.from_numpy(draw.integers(0, 256, (n, 3, SIDE, SIDE), dtype=np.uint8))


def generate(model: Kosmos, prompts: list[Prompt], images: torch.Tensor, n_beams: int, n_new: int) -> list[list[int]]:
    """Generate with kosmos-lit."""
    vocabulary: Any = SimpleNamespace(special=SPECIAL, vocab_size=VOCAB, extra=(), decode=lambda ids, **_: str(ids))
    settings = GenerationConfig(max_new_tokens=n_new, n_beams=n_beams, allow_control_tokens=True)
    return [list(c.tokens) for c in Engine(model, vocabulary).generate_batch(prompts, images, settings)]


def generate_reference(model: Any, prompts: list[Prompt], pixels: torch.Tensor, n_beams: int, n_new: int) -> list[list[int]]:
    """Generate with transformers."""
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).to(pixels.device)
    in_slot = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        in_slot[row, int(prompt.slots[0]) : int(prompt.slots[0]) + N_LATENTS] = 1
    outputs = model.generate(
        pixel_values=pixels,
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        image_embeds_position_mask=in_slot,
        do_sample=False,
        num_beams=n_beams,
        max_new_tokens=n_new,
    )
    rows: list[list[int]] = outputs[:, tokens.shape[1] :].tolist()
    return rows


def measure(sides: Sequence[Callable[[], object]], n_runs: int) -> list[tuple[float, float]]:
    """Return each side's median wall-clock and CPU seconds over alternating runs."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in sides]
    for _ in range(n_runs):
        for side, times in zip(sides, seconds, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [tuple(map(statistics.median, zip(*times, strict=True))) for times in seconds]  # type: ignore[misc]


def main() -> None:
    """Print one line for each batch size and number of beams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="width and layers: " + str(SIZES))
    parser.add_argument("--runs", type=int, default=5, help="that count, of each side")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    model = prepare(Kosmos.create(model_config(a.size)))
    reference = to_transformers(model)
    n = sum(p.numel() for p in model.parameters())
    print(
        f"{describe_device(torch.device('cpu'))}; {torch.get_num_threads()} threads, transformers {transformers.__version__}"
    )
    print(
        f"{a.size}: {n:,} parameters, float32; prompts of {N_WORDS + N_LATENTS + 3} positions, {a.new_tokens} new tokens, "
        f"median of {a.runs}"
    )
    print("batch beams   kosmos-lit tok/s   transformers tok/s   ratio   ratio by CPU time   tokens")
    for size in a.batch:
        prompts, images = make_prompts(size)
        mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (model.config.vision.mean, model.config.vision.std))
        pixels = (images.float() - mean) / std
        for n_beams in a.beams:
            sides = [
                partial(generate, model, prompts, images, n_beams, a.new_tokens),
                partial(generate_reference, reference, prompts, pixels, n_beams, a.new_tokens),
            ]
            actual, expected = (side() for side in sides)
            if actual != expected or any(len(ids) != a.new_tokens for ids in actual):
                raise SystemExit(f"batch {size}, {n_beams} beams: the two sides differ\n{actual}\n{expected}")
            (wall, cpu), (reference_wall, reference_cpu) = measure(sides, a.runs)
            n_tokens = size * a.new_tokens
            print(
                f"{size:5} {n_beams:5} {n_tokens / wall:18.1f} {n_tokens / reference_wall:20.1f} "
                f"{reference_wall / wall:7.2f} {reference_cpu / cpu:19.2f}   equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
