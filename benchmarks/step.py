"""A training step of kosmos-lit and of transformers' Kosmos-2: same weights, documents, targets and optimizer, in one run.

    python -m benchmarks.step [--size small] [--rounds 5] [--threads 1 2] [--rows 5 5 2] [--profile] [--json FILE]

A step is forward and backward over all micro-batches, clipping, AdamW. Documents of real lengths
(benchmarks/synthetic_batches.py) make rows of text, captions and pages at 5 : 5 : 2. kosmos-lit reads the packed rows.
transformers reads the same documents, one per padded row, in the reference's micro-batches: one full row of text, six
captions, one page; with `--short-text` six short texts. Loss and gradient norm of both must agree before anything is timed;
dropout is off in both. The two take turns: a number is the median over the rounds, a ratio the median of the rounds' ratios,
transformers' time over kosmos-lit's. Tokens are positions of documents, never padding. CPU time is steadier than the clock
on a machine with other work.

The output matrix is most of a small model, but 9 % of the paper's. `--vocab 4096` gives `small` the paper's share.
`--profile` prints the operations that take most of a step, for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.synthetic_batches import Document, SyntheticBatches, n_targets
from kosmos_lit.checks.device import describe_device
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.keys import TRANSFORMERS
from kosmos_lit.tokenizer import IGNORE, PAD, SpecialTokens
from kosmos_lit.weights.kosmos2 import to_transformers

KINDS = ("text", "caption", "interleaved")
SIZES = {"micro": (64, 2, 2), "tiny": (256, 4, 4), "small": (512, 6, 8), "medium": (768, 12, 12)}
"""Width, layers, heads of the decoder."""
MICRO_BATCH = {"text": 1, "caption": 6, "interleaved": 1}
"""Documents per micro-batch in the reference (unilm kosmos-2/train.sh)."""
SHORT_TEXTS = 6
VOCAB, N_LATENTS = 65_037, 64
CLIP_NORM = 2.0
MIN_RATIOS = {"mixture": 1.3, "caption": 1.5}
"""Required ratios of tokens per second."""
Times = dict[str, tuple[float, float]]
"""Wall-clock and CPU seconds of each part of a step."""


@dataclass(frozen=True)
class Step:
    """The micro-batches of one step, for both models, and its size."""

    packed: list[tuple[str, Any]]
    """For Kosmos: (kind, KosmosBatch)."""
    padded: list[tuple[str, dict[str, Tensor]]]
    """For transformers: (kind, arguments of the model)."""
    n_targets: int
    tokens: dict[str, int]
    """Positions of documents, by kind."""
    positions: dict[str, tuple[int, int]]
    """Positions with padding, by kind: packed, padded."""


def make_model(size: str, vocab: int, seq_len: int, image_size: int) -> Kosmos:
    """Return a Kosmos in training mode that transformers can express, without dropout."""
    dim, n_layers, n_heads = SIZES[size]
    width = dim // 2
    tower = {"image_size": image_size, "patch_size": 14, "width": width, "layers": 4, "head_width": min(64, width)}
    architecture = {"embed_dim": width, "vision_cfg": tower, "quick_gelu": True}
    config = KosmosConfig(
        vision=VisionConfig(architecture=architecture, pretrained=None, image_size=image_size),
        connector=ConnectorConfig(n_latents=N_LATENTS, n_heads=n_heads, attention_dropout_rate=0.0),
        decoder=DecoderConfig(
            vocab_size=vocab,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            ffn_dim=4 * dim,
            positions="sinusoidal",
            max_seq_len=seq_len,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
        ),
    )
    return Kosmos.create(config).train()


def make_transformers(model: Kosmos) -> Any:
    """Return the same model in transformers, in training mode, with the same parameters frozen."""
    other: Any = to_transformers(model).train()
    parameters = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        for their_name in TRANSFORMERS.external_names(name):
            parameters[their_name].requires_grad_(parameter.requires_grad)
    return other


def make_step(model: Kosmos, synthetic: SyntheticBatches, n_rows: Sequence[int], micro_rows: int, short_text: bool) -> Step:
    """Return the micro-batches of one step, the same documents for both models."""
    draw = np.random.default_rng(0)
    rows = {k: synthetic.rows(k, n, draw, short_text=short_text) for k, n in zip(KINDS, n_rows, strict=True) if n}
    total = sum(map(n_targets, rows.values()))
    packed, padded, tokens, positions = [], [], {}, {}
    for kind, of_kind in rows.items():
        batches = [synthetic.batch(of_kind[i : i + micro_rows], total) for i in range(0, len(of_kind), micro_rows)]
        packed += [(kind, batch) for batch in batches]
        documents = [document for row in of_kind for document in row]
        batch_size = SHORT_TEXTS if kind == "text" and short_text else MICRO_BATCH[kind]
        # Shuffled, as packing puts like lengths together and a corpus does not; images stay with their documents.
        pixels = _normalised(model, torch.cat([batch.images for batch in batches]))
        pixels_of = pixels.split([len(document.first_slots) for document in documents])
        order = draw.permutation(len(documents)).tolist()
        padded_batches = [
            pad([documents[d] for d in some], synthetic.n_latents, torch.cat([pixels_of[d] for d in some]))
            for some in (order[i : i + batch_size] for i in range(0, len(order), batch_size))
        ]
        padded += [(kind, batch) for batch in padded_batches]
        tokens[kind] = sum(batch.n_real for batch in batches)
        positions[kind] = (sum(b.tokens.numel() for b in batches), sum(b["input_ids"].numel() for b in padded_batches))
    return Step(packed, padded, total, tokens, positions)


def pad(documents: Sequence[Document], n_latents: int, pixels: Tensor) -> dict[str, Tensor]:
    """Return one document per row, as transformers' processor and a collator with labels do."""
    shape = len(documents), max(len(document.tokens) for document in documents)
    ids, targets, places = torch.full(shape, PAD), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        ids[row, :n], targets[row, :n] = torch.from_numpy(document.tokens), torch.from_numpy(document.targets)
        for first in document.first_slots:
            places[row, first : first + n_latents] = 1
    # With `shift_labels` transformers does not shift `labels` itself, which would lose the last target.
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": targets, "shift_labels": targets}
    return batch | ({"pixel_values": pixels, "image_embeds_position_mask": places} if len(pixels) else {})


def _normalised(model: Kosmos, images: Tensor) -> Tensor:
    """Return images as transformers' image processor does."""
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (model.config.vision.mean, model.config.vision.std))
    return (images.float() - mean) / std


def kosmos_loss(model: Kosmos, batch: Any, n_step_targets: int) -> Tensor:
    """Return a micro-batch's part of the step's loss, as KosmosLit computes it."""
    loss, _ = model.loss(batch, 1 / n_step_targets)
    return loss


def transformers_loss(model: Any, batch: dict[str, Tensor], n_step_targets: int) -> Tensor:
    """Return a micro-batch's part of the step's loss, as transformers' Trainer computes it."""
    network = model if "pixel_values" in batch else model.text_model  # the full model requires images
    loss: Tensor = network(**batch, num_items_in_batch=n_step_targets).loss
    return loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)


class TrainLoop:
    """A model with its loss, batches and optimizer."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batches: list[tuple[str, Any]], total: int) -> None:
        self.model, self.loss, self.batches, self.total = model, loss, batches, total
        self.optimizer = optimizer(model)

    def gradients(self, kind: str | None = None) -> float:
        """Accumulate the gradients of all micro-batches, or of one kind's; return their part of the loss."""
        value = 0.0
        for batch_kind, batch in self.batches:
            if kind in (None, batch_kind):
                loss = self.loss(self.model, batch, self.total)
                loss.backward()
                value += loss.item()
        return value

    def update(self) -> float:
        """Clip, step and zero the gradients; return their norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def timed_step(self) -> Times:
        """Take a step; return the seconds of each part."""
        times = {}
        for kind in dict.fromkeys(kind for kind, _ in self.batches):
            times[kind] = _timed(partial(self.gradients, kind))
        times["optimizer"] = _timed(self.update)
        times["mixture"] = tuple(map(sum, zip(*times.values(), strict=True)))  # type: ignore[assignment]
        return times


def _timed(act: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


def check(kosmos: TrainLoop, transformers: TrainLoop) -> dict[str, float]:
    """Take the first step of both; return their losses and gradient norms.

    Raises: SystemExit if they differ by more than float32 explains.
    """
    losses = [loop.gradients() for loop in (kosmos, transformers)]
    norms = [loop.update() for loop in (kosmos, transformers)]
    for name, (ours, reference) in {"losses": losses, "gradient norms": norms}.items():
        if abs(ours - reference) > 1e-3 * abs(reference):  # float32 sums of tens of thousands of terms in other orders
            raise SystemExit(f"the {name} differ: {ours} in kosmos-lit, {reference} in transformers")
    return {
        "loss": losses[0],
        "transformers, loss": losses[1],
        "gradient norm": norms[0],
        "transformers, gradient norm": norms[1],
    }


def compare(step: Step, kosmos: TrainLoop, transformers: TrainLoop, n_rounds: int) -> list[dict[str, Any]]:
    """Return the lines of the table."""
    loops = (kosmos, transformers)
    rounds: list[list[Times]] = [[], []]
    for number in range(n_rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for i in order:
            rounds[i].append(loops[i].timed_step())
        last = [times[-1]["mixture"][1] for times in rounds]
        print(f"  round {number + 1}: {last[0]:.1f} and {last[1]:.1f} CPU seconds", flush=True)
    lines = []
    for part in rounds[0][0]:
        ours, reference = ([times[part] for times in of_loop] for of_loop in rounds)
        tokens = sum(step.tokens.values()) if part == "mixture" else step.tokens.get(part)
        positions = step.positions.values() if part == "mixture" else [step.positions.get(part, (1, 1))]
        with_padding = [sum(column) for column in zip(*positions, strict=True)]
        line: dict[str, Any] = {"part": part, "tokens": tokens}
        for name, times, n_positions in (
            ("kosmos-lit", ours, with_padding[0]),
            ("transformers", reference, with_padding[1]),
        ):
            wall = statistics.median(t[0] for t in times)
            line[f"{name}, s"] = round(wall, 3)
            line[f"{name}, tok/s"] = tokens and round(tokens / wall)
            line[f"{name}, padding"] = tokens and round(1 - tokens / n_positions, 3)
        for name, clock in (("ratio", 0), ("ratio by CPU time", 1)):
            ratios = [b[clock] / a[clock] for a, b in zip(ours, reference, strict=True)]
            line[name] = round(statistics.median(ratios), 2)
        lines.append(line | {"required": MIN_RATIOS.get(part)})
    return lines


def profiled(loop: TrainLoop, n_rows: int) -> str:
    """Return a table of the operations that take most of a step's CPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loop.gradients()
        loop.update()
    return profile.key_averages().table(  # type: ignore[no-any-return]
        sort_by="self_cpu_time_total", row_limit=n_rows, max_name_column_width=48
    )


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print lines with the same columns as a table."""
    columns = list(lines[0])
    cells = [
        columns,
        *(
            ["" if line[c] is None else f"{line[c]:,}" if isinstance(line[c], int) else str(line[c]) for c in columns]
            for line in lines
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Measure with the options `a`; print tables on the way and return the results."""
    import transformers

    transformers.logging.set_verbosity_error()
    synthetic = SyntheticBatches(SpecialTokens.for_pieces(a.vocab - 1037), N_LATENTS, a.image_size, a.seq_len)
    model = make_model(a.size, a.vocab, a.seq_len, a.image_size)
    step = make_step(model, synthetic, a.rows, a.micro_rows, a.short_text)
    kosmos = TrainLoop(model, kosmos_loss, step.packed, step.n_targets)
    reference = TrainLoop(make_transformers(model), transformers_loss, step.padded, step.n_targets)
    kernel = reference.model.config.text_config._attn_implementation
    results: dict[str, Any] = {
        "machine": describe_device(torch.device("cpu")),
        "transformers": transformers.__version__,
        "attention in transformers": kernel,
        "size": a.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": a.vocab,
        "positions of a row": a.seq_len,
        "rows": dict(zip(KINDS, a.rows, strict=True)),
        "short text": a.short_text,
        "rows of a packed micro-batch": a.micro_rows,
        "targets": step.n_targets,
        "rounds": a.rounds,
    }
    print("; ".join(f"{name} {value}" for name, value in results.items()))
    torch.set_num_threads(a.threads[0])
    results["agreement"] = check(kosmos, reference)
    print(results["agreement"], flush=True)
    results["threads"] = {}
    for n_threads in a.threads:
        torch.set_num_threads(n_threads)
        if n_threads != a.threads[0]:  # the check was a step of both
            for loop in (kosmos, reference):
                loop.timed_step()
        print(f"{n_threads} threads")
        results["threads"][n_threads] = compare(step, kosmos, reference, a.rounds)
        show(results["threads"][n_threads])
    if a.profile:
        for name, loop in (("kosmos-lit", kosmos), ("transformers", reference)):
            print(f"{name}\n{profiled(loop, a.profile)}")
    return results


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help=f"width, layers and heads: {SIZES}")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=224, help="in pixels")
    parser.add_argument("--rows", type=int, nargs=3, default=[5, 5, 2], metavar="N", help="of text, captions, pages")
    parser.add_argument("--micro-rows", type=int, default=1, help="rows of a packed micro-batch")
    parser.add_argument("--short-text", action="store_true", help="texts of some 300 tokens instead of full rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--profile", type=int, nargs="?", const=20, default=0, metavar="N", help="operations to list")
    parser.add_argument("--json", type=Path, help="where the results are written too")
    return parser


def main() -> None:
    """Print the tables."""
    a = arguments().parse_args()
    results = run(a)
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
