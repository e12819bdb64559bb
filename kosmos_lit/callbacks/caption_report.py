"""What a run has learned to say: generated answers against right ones, with a control that takes sight away."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw
from torch import Tensor

from kosmos_lit.batch import PromptBatch
from kosmos_lit.checks.device import describe_device
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.lit import KosmosLit


@dataclass(frozen=True)
class Answered:
    """One question, its right answer, and the model's with the true image and with another question's."""

    task: str
    image: Tensor | None
    """(3, H, W): the question's first image."""
    target: str
    prediction: str
    prediction_shuffled: str


class CaptionReport(Callback):
    """At the end of `fit` answers the data module's questions greedily, prints a table, and writes three files.

    `report.json` has the figures, `answers.jsonl` every answer, `sheet.png` images with true and generated captions.
    An answer counts if it is exactly right. The control asks every question again with the images shuffled among the
    questions of its batch: what remains right then was not seen.
    """

    def __init__(self, tasks: Sequence[str] = ("object", "count"), max_new_tokens: int = 32, sheet: int = 24) -> None:
        """Choose what counts.

        Args:
            tasks: Tasks whose answers make up `exact_match`; others are shown beside.
            max_new_tokens: Longest answer.
            sheet: Images on the sheet.
        """
        self.tasks, self.max_new_tokens, self.sheet = tuple(tasks), max_new_tokens, sheet
        self.loss_before: dict[str, float] = {}
        self._train_seconds = self._started = 0.0
        self._positions = 0

    def state_dict(self) -> dict[str, Any]:
        seconds = self._train_seconds + (time.monotonic() - self._started if self._started else 0.0)
        return {"loss_before": self.loss_before, "train_seconds": seconds, "positions": self._positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_before = state_dict["loss_before"]
        self._train_seconds, self._positions = state_dict["train_seconds"], state_dict["positions"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:  # Lightning forgets its figures before training starts
            self.loss_before = validation_losses(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._positions += batch.n_real * trainer.world_size

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        self._train_seconds += time.monotonic() - self._started
        self._started = 0.0
        with pl_module.full_net() as net:
            answered = [a for batch in _questions(trainer) for a in self._ask(pl_module, batch)]
            n_parameters = sum(p.numel() for p in net.parameters())
        if trainer.is_global_zero:
            self._write(trainer, pl_module, answered, n_parameters)

    def _ask(self, pl_module: KosmosLit, batch: PromptBatch) -> list[Answered]:
        batch = batch.to(pl_module.device)
        blind = replace(batch, images=batch.images.roll(max(1, len(batch.images) // 2), dims=0))
        settings = GenerationConfig(max_new_tokens=self.max_new_tokens)
        prediction = pl_module.generate_texts(batch, settings)
        prediction_shuffled = pl_module.generate_texts(blind, settings)
        first = accumulate(batch.n_images, initial=0)
        images = [batch.images[i].cpu() if n else None for i, n in zip(first, batch.n_images, strict=False)]
        return [
            Answered(*row) for row in zip(batch.tasks, images, batch.targets, prediction, prediction_shuffled, strict=True)
        ]

    def _write(self, trainer: L.Trainer, pl_module: KosmosLit, answered: Sequence[Answered], n_parameters: int) -> None:
        folder = Path(trainer.default_root_dir)
        by_task: dict[str, list[Answered]] = defaultdict(list)
        for a in answered:
            by_task[a.task].append(a)
        chosen = [a for a in answered if a.task in self.tasks]
        metrics = {
            "exact_match": exact(chosen),
            "exact_match_shuffled": exact_blind(chosen),
            "n_questions": len(chosen),
            "n_distinct": len({a.target for a in chosen}),
            "tasks": {
                task: {"n": len(rows), "exact_match": exact(rows), "exact_match_shuffled": exact_blind(rows)}
                for task, rows in by_task.items()
            },
            "train_seconds": round(self._train_seconds, 1),
            "loss_before": self.loss_before,
            "loss_after": validation_losses(trainer),
            "tokens_per_second": round(self._positions / self._train_seconds, 1),
            "steps": trainer.global_step,
            "seed": pl_module.seed,
            "parameters": n_parameters,
            "machine": describe_device(pl_module.device),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for a in answered:
                row = {
                    "task": a.task,
                    "target": a.target,
                    "prediction": a.prediction,
                    "prediction_shuffled": a.prediction_shuffled,
                }
                file.write(json.dumps(row) + "\n")
        per_task = max(1, self.sheet // max(1, len(by_task)))
        draw_sheet([a for rows in by_task.values() for a in rows[:per_task]]).save(folder / "sheet.png")
        print(table(metrics))
        print(f"wrote {folder / 'report.json'}, {folder / 'answers.jsonl'} and {folder / 'sheet.png'}")


def _questions(trainer: L.Trainer) -> Iterator[PromptBatch]:
    """Yield what the data module asks. The run is done: if that is nothing, the report says so and has no answers."""
    try:
        yield from trainer.datamodule.predict_dataloader()  # type: ignore[attr-defined]
    except UserError as error:
        rank_zero_info(f"the report has no answers: {error}")


def exact(answered: Sequence[Answered]) -> float:
    """Return the share of answers that are exactly right."""
    return round(sum(a.prediction == a.target for a in answered) / max(1, len(answered)), 4)


def exact_blind(answered: Sequence[Answered]) -> float:
    """Return the share that is right with another question's image."""
    return round(sum(a.prediction_shuffled == a.target for a in answered) / max(1, len(answered)), 4)


def validation_losses(trainer: L.Trainer) -> dict[str, float]:
    """Return the last validation's loss of each corpus, in nats a token."""
    prefix = "val/loss/"
    return {k.removeprefix(prefix): round(float(v), 4) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def table(metrics: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = ["", f"{'task':<14}{'questions':>10}{'exact match':>13}{'images shuffled':>19}"]
    lines += [
        f"{name:<14}{row['n']:>10}{row['exact_match']:>13.3f}{row['exact_match_shuffled']:>19.3f}"
        for name, row in metrics["tasks"].items()
    ]
    lines += [
        f"{'counted':<14}{metrics['n_questions']:>10}{metrics['exact_match']:>13.3f}{metrics['exact_match_shuffled']:>19.3f}"
        f"   ({metrics['n_distinct']} distinct answers)",
        "",
        f"{'corpus':<14}{'loss before':>12}{'after':>9}   nats a token, validation",
    ]
    before, after = metrics["loss_before"], metrics["loss_after"]
    lines += [f"{name:<14}{before.get(name, float('nan')):>12.3f}{loss:>9.3f}" for name, loss in after.items()]
    lines += [
        "",
        f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['parameters']:,} parameters, seed {metrics['seed']}",
        metrics["machine"],
    ]
    return "\n".join(lines)


def draw_sheet(answered: Sequence[Answered], columns: int = 4, side: int = 144) -> Image.Image:
    """Return a sheet of images, each with the right answer in grey and the model's in green or red."""
    width, height = side + 116, side + 76
    rows = -(-len(answered) // columns)
    sheet = Image.new("RGB", (columns * width, max(1, rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, a in enumerate(answered):
        x, y = i % columns * width + 8, i // columns * height + 8
        if a.image is not None:  # a question without images has an empty frame
            image = Image.fromarray(a.image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgrey")
        draw.multiline_text((x, y + side + 4), _wrapped(a.target), fill="dimgrey")
        colour = "darkgreen" if a.prediction == a.target else "crimson"
        draw.multiline_text((x, y + side + 36), _wrapped(a.prediction), fill=colour)
    return sheet


def _wrapped(text: str, width: int = 40) -> str:
    if len(text) <= width:
        return text
    at = text.rfind(" ", 0, width)
    at = at if at > 0 else width
    return f"{text[:at]}\n{text[at:].strip()[:width]}"
