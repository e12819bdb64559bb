"""A training step of ours and of transformers' Kosmos-2: the same weights, documents, targets and optimizer, in one run.

    python -m benchmarks.step [--size small] [--rounds 5] [--threads 1 2] [--rows 5 5 2] [--profile] [--json FILE]

A step is forward and backward over all micro-batches, clipping, AdamW. Documents of real lengths
(benchmarks/made_batches.py) make rows of text, captions and pages at 5 : 5 : 2. Ours reads the packed rows. transformers
reads the same documents one a padded row, in the reference's micro-batches: one full row of text, six captions, one page;
where texts are short (`--short-text`) six of them. Before the clock runs, loss and gradient norm of both must agree; dropout
is off on both sides, then and afterwards. Sides take turns; a figure is the median over the rounds, a ratio the median of
the rounds' ratios, theirs over ours; tokens are positions of documents, never padding. CPU time is steadier than the clock
where a machine has other work to do.

A small model's output matrix is most of it, 9 % of the paper's. `--vocab 4096` gives `small` the paper's share.
`--profile` prints, for each side, the operations that take most of a step.
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

from benchmarks.made_batches import Document, Made, n_targets
from kosmos_lit.checks.device import describe_device
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import IGNORE, PAD, SpecialTokens
from kosmos_lit.weights import to_transformers
from kosmos_lit.weights.keys import TRANSFORMERS

KINDS = ("text", "caption", "interleaved")
SIZES = {"micro": (64, 2, 2), "tiny": (256, 4, 4), "small": (512, 6, 8), "medium": (768, 12, 12)}
"""Width, layers, heads of the decoder."""
MICRO_BATCH = {"text": 1, "caption": 6, "interleaved": 1}
"""Documents of a micro-batch in the reference (unilm kosmos-2/train.sh)."""
SHORT_TEXTS = 6
VOCAB, N_LATENTS = 65_037, 64
CLIP_NORM = 2.0
BARS = {"mixture": 1.3, "caption": 1.5}
"""Ratios of tokens a second that are asked for."""
Times = dict[str, tuple[float, float]]
"""Wall-clock and CPU seconds of each part of a step."""


@dataclass(frozen=True)
class Step:
    """The micro-batches of one step for each side, and its size."""

    ours: list[tuple[str, Any]]
    theirs: list[tuple[str, dict[str, Tensor]]]
    n_targets: int
    tokens: dict[str, int]
    """Positions of documents, by kind."""
    positions: dict[str, tuple[int, int]]
    """Positions with padding, by kind: ours, theirs."""


def make_model(size: str, vocab: int, seq_len: int, side: int) -> Kosmos:
    """Return a Kosmos in training mode that transformers can express, without dropout."""
    dim, n_layers, n_heads = SIZES[size]
    width = dim // 2
    tower = {"image_size": side, "patch_size": 14, "width": width, "layers": 4, "head_width": min(64, width)}
    architecture = {"embed_dim": width, "vision_cfg": tower, "quick_gelu": True}
    config = KosmosConfig(
        vision=VisionConfig(architecture=architecture, pretrained=None, image_size=side),
        connector=ConnectorConfig(n_latents=N_LATENTS, n_heads=n_heads, attention_dropout_rate=0.0),
        decoder=DecoderConfig(
            vocab_size=vocab, dim=dim, n_layers=n_layers, n_heads=n_heads, ffn_dim=4 * dim, positions="sinusoidal",
            max_seq_len=seq_len, dropout_rate=0.0, attention_dropout_rate=0.0,
        ),
    )  # fmt: skip
    return Kosmos.create(config).train()


def make_theirs(model: Kosmos) -> Any:
    """Return the same model in transformers, in training mode, with the same parameters frozen."""
    other: Any = to_transformers(model).train()
    parameters = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        for their_name in TRANSFORMERS.theirs(name):
            parameters[their_name].requires_grad_(parameter.requires_grad)
    return other


def make_step(model: Kosmos, made: Made, n_rows: Sequence[int], micro_rows: int, short_text: bool) -> Step:
    """Return one step's documents for both sides."""
    draw = np.random.default_rng(0)
    rows = {k: made.rows(k, n, draw, short_text=short_text) for k, n in zip(KINDS, n_rows, strict=True) if n}
    total = sum(map(n_targets, rows.values()))
    ours, theirs, tokens, positions = [], [], {}, {}
    for kind, of_kind in rows.items():
        batches = [made.batch(of_kind[i : i + micro_rows], total) for i in range(0, len(of_kind), micro_rows)]
        ours += [(kind, batch) for batch in batches]
        documents = [document for row in of_kind for document in row]
        at_once = SHORT_TEXTS if kind == "text" and short_text else MICRO_BATCH[kind]
        # The images of our batches, each with its document; packing has put like lengths together, a corpus does not.
        pixels = _normalised(model, torch.cat([batch.images for batch in batches]))
        of_document = pixels.split([len(document.first_slots) for document in documents])
        order = draw.permutation(len(documents)).tolist()
        padded = [
            pad([documents[d] for d in some], made.n_latents, torch.cat([of_document[d] for d in some]))
            for some in (order[i : i + at_once] for i in range(0, len(order), at_once))
        ]
        theirs += [(kind, batch) for batch in padded]
        tokens[kind] = sum(batch.n_real for batch in batches)
        positions[kind] = (sum(b.tokens.numel() for b in batches), sum(b["input_ids"].numel() for b in padded))
    return Step(ours, theirs, total, tokens, positions)


def pad(documents: Sequence[Document], n_latents: int, pixels: Tensor) -> dict[str, Tensor]:
    """Return documents, one a row, as transformers' processor and a collator with labels give them."""
    shape = len(documents), max(len(document.tokens) for document in documents)
    ids, targets, places = torch.full(shape, PAD), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        ids[row, :n], targets[row, :n] = torch.from_numpy(document.tokens), torch.from_numpy(document.targets)
        for first in document.first_slots:
            places[row, first : first + n_latents] = 1
    # With `shift_labels` they do not shift `labels` themselves, and the last target is kept.
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": targets, "shift_labels": targets}
    return batch | ({"pixel_values": pixels, "image_embeds_position_mask": places} if len(pixels) else {})


def _normalised(model: Kosmos, images: Tensor) -> Tensor:
    """Return images as their image processor hands them over."""
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (model.config.vision.mean, model.config.vision.std))
    return (images.float() - mean) / std


def our_loss(model: Kosmos, batch: Any, n_step_targets: int) -> Tensor:
    """Return a micro-batch's part of the step's loss, as KosmosLit computes it."""
    loss, _ = model.loss(batch, 1 / n_step_targets)
    return loss


def their_loss(model: Any, batch: dict[str, Tensor], n_step_targets: int) -> Tensor:
    """Return a micro-batch's part of the step's loss, as transformers' Trainer asks for it."""
    side = model if "pixel_values" in batch else model.text_model  # the whole model insists on images
    loss: Tensor = side(**batch, num_items_in_batch=n_step_targets).loss
    return loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)


class Side:
    """A model with its optimizer, and how it takes a step."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batches: list[tuple[str, Any]], total: int) -> None:
        self.model, self.loss, self.batches, self.total = model, loss, batches, total
        self.optimizer = optimizer(model)

    def gradients(self, kind: str | None = None) -> float:
        """Add the gradients of a kind's micro-batches, or of all; return their part of the loss."""
        value = 0.0
        for of_kind, batch in self.batches:
            if kind in (None, of_kind):
                loss = self.loss(self.model, batch, self.total)
                loss.backward()
                value += loss.item()
        return value

    def update(self) -> float:
        """Clip, step, and forget the gradients; return their norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def timed_step(self) -> Times:
        """Take a step; return what each part took."""
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


def check(ours: Side, theirs: Side) -> dict[str, float]:
    """Compare loss and gradient norm of the first step, and take it.

    Raises: SystemExit if they differ by more than float32 explains.
    """
    losses = [side.gradients() for side in (ours, theirs)]
    norms = [side.update() for side in (ours, theirs)]
    for name, (mine, yours) in {"losses": losses, "gradient norms": norms}.items():
        if abs(mine - yours) > 1e-3 * abs(yours):  # float32 sums of tens of thousands of terms in other orders
            raise SystemExit(f"the {name} of the two sides differ: {mine} and {yours}")
    return {"loss": losses[0], "loss of theirs": losses[1], "gradient norm": norms[0], "gradient norm of theirs": norms[1]}


def compare(step: Step, ours: Side, theirs: Side, n_rounds: int) -> list[dict[str, Any]]:
    """Return the lines of the table."""
    rounds: list[list[Times]] = [[], []]
    for number in range(n_rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            rounds[which].append((ours, theirs)[which].timed_step())
        last = [side[-1]["mixture"][1] for side in rounds]
        print(f"  round {number + 1}: {last[0]:.1f} and {last[1]:.1f} CPU seconds", flush=True)
    lines = []
    for part in rounds[0][0]:
        mine, yours = ([times[part] for times in side] for side in rounds)
        tokens = sum(step.tokens.values()) if part == "mixture" else step.tokens.get(part)
        positions = step.positions.values() if part == "mixture" else [step.positions.get(part, (1, 1))]
        with_padding = [sum(column) for column in zip(*positions, strict=True)]
        line: dict[str, Any] = {"part": part, "tokens": tokens}
        for name, side, all_ in (("ours", mine, with_padding[0]), ("theirs", yours, with_padding[1])):
            wall = statistics.median(t[0] for t in side)
            line[f"{name}, s"] = round(wall, 3)
            line[f"{name}, tok/s"] = tokens and round(tokens / wall)
            line[f"{name}, padding"] = tokens and round(1 - tokens / all_, 3)
        for name, which in (("ratio", 0), ("ratio by CPU time", 1)):
            line[name] = round(statistics.median(y[which] / m[which] for m, y in zip(mine, yours, strict=True)), 2)
        lines.append(line | {"asked": BARS.get(part)})
    return lines


def profiled(side: Side, n_rows: int) -> str:
    """Return a table of the operations that take most of a step's CPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        side.gradients()
        side.update()
    return profile.key_averages().table(  # type: ignore[no-any-return]
        sort_by="self_cpu_time_total", row_limit=n_rows, max_name_column_width=48
    )


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print lines of equal columns as a table."""
    columns = list(lines[0])
    cells = [columns, *(["" if line[c] is None else f"{line[c]:,}" if isinstance(line[c], int) else str(line[c])
                         for c in columns] for line in lines)]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for; print tables on the way."""
    import transformers

    transformers.logging.set_verbosity_error()
    made = Made(SpecialTokens.after(a.vocab - 1037), N_LATENTS, a.side, a.seq_len)
    model = make_model(a.size, a.vocab, a.seq_len, a.side)
    step = make_step(model, made, a.rows, a.micro_rows, a.short_text)
    ours = Side(model, our_loss, step.ours, step.n_targets)
    theirs = Side(make_theirs(model), their_loss, step.theirs, step.n_targets)
    kernel = theirs.model.config.text_config._attn_implementation
    figures: dict[str, Any] = {
        "machine": describe_device(torch.device("cpu")),
        "transformers": transformers.__version__, "attention of theirs": kernel,
        "size": a.size, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": a.vocab,
        "positions of a row": a.seq_len, "rows": dict(zip(KINDS, a.rows, strict=True)), "short text": a.short_text,
        "micro-batch of ours, rows": a.micro_rows, "targets": step.n_targets, "rounds": a.rounds,
    }  # fmt: skip
    print("; ".join(f"{name} {value}" for name, value in figures.items()))
    torch.set_num_threads(a.threads[0])
    figures["agreement"] = check(ours, theirs)
    print(figures["agreement"], flush=True)
    figures["threads"] = {}
    for n_threads in a.threads:
        torch.set_num_threads(n_threads)
        if n_threads != a.threads[0]:  # the check was a step of both
            for side in (ours, theirs):
                side.timed_step()
        print(f"{n_threads} threads")
        figures["threads"][n_threads] = compare(step, ours, theirs, a.rounds)
        show(figures["threads"][n_threads])
    if a.profile:
        for name, side in (("ours", ours), ("theirs", theirs)):
            print(f"{name}\n{profiled(side, a.profile)}")
    return figures


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help=f"width, layers and heads: {SIZES}")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--side", type=int, default=224, help="of the images")
    parser.add_argument("--rows", type=int, nargs=3, default=[5, 5, 2], metavar="N", help="of text, captions, pages")
    parser.add_argument("--micro-rows", type=int, default=1, help="rows of a micro-batch of ours")
    parser.add_argument("--short-text", action="store_true", help="texts of some 300 tokens in place of full rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--profile", type=int, nargs="?", const=20, default=0, metavar="N", help="operations to list")
    parser.add_argument("--json", type=Path, help="where the figures go too")
    return parser


def main() -> None:
    """Print the tables."""
    a = arguments().parse_args()
    figures = run(a)
    if a.json:
        a.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
