"""The report at the end of a run: generated answers against targets, with true and with shuffled images."""

from __future__ import annotations

import json
import math
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
from kosmos_lit.terminal import table


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with its target, and the predictions from its own image and from a shuffled one."""

    task: str
    image: Tensor | None
    """(3, H, W): the question's first image."""
    target: str
    prediction: str
    prediction_shuffled: str


class CaptionReport(Callback):
    """Answers the data module's questions greedily at the end of `fit`, prints a table, and writes three files.

    `report.json` has the metrics, `answers.jsonl` every answer, `sheet.png` images with targets and predictions. The metric
    is exact match. The image control asks every question again with the images shuffled within its batch: an answer that
    is still right did not need its image.
    """

    def __init__(self, tasks: Sequence[str] = ("object", "count"), max_new_tokens: int = 32, sheet: int = 24) -> None:
        """Set which tasks count.

        Args:
            tasks: Tasks whose answers make up `exact_match`; others have rows of their own.
            max_new_tokens: Longest answer, in tokens.
            sheet: Images on the contact sheet.
        """
        self.tasks, self.max_new_tokens, self.sheet = tuple(tasks), max_new_tokens, sheet
        self.loss_before: dict[str, float] = {}
        self._train_seconds = self._started = 0.0
        self._positions = 0

    def state_dict(self) -> dict[str, Any]:
        # Checkpoints are written while the clock runs.
        seconds = self._train_seconds + (time.monotonic() - self._started if self._started else 0.0)
        return {"loss_before": self.loss_before, "train_seconds": seconds, "positions": self._positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A resumed run has no sanity check that would measure them again.
        self.loss_before = state_dict["loss_before"]
        self._train_seconds, self._positions = state_dict["train_seconds"], state_dict["positions"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:  # Lightning clears its metrics before training starts
            self.loss_before = validation_losses(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # An estimate: every rank counts as this one does, which needs no reduction at each step.
        self._positions += batch.n_real * trainer.world_size

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        self._train_seconds += time.monotonic() - self._started
        self._started = 0.0
        # All ranks answer, as gathering a sharded model is a collective; rank 0 writes.
        with pl_module.full_net() as net:
            answers = [a for batch in _question_batches(trainer) for a in self._answer(pl_module, batch)]
            n_parameters = sum(p.numel() for p in net.parameters())
        if trainer.is_global_zero:
            self._write(trainer, pl_module, answers, n_parameters)

    def _answer(self, pl_module: KosmosLit, batch: PromptBatch) -> list[AnsweredQuestion]:
        batch = batch.to(pl_module.device)
        # By half the batch, and at least by one: no image stays in its place unless it is the only one.
        shuffled = replace(batch, images=batch.images.roll(max(1, len(batch.images) // 2), dims=0))
        settings = GenerationConfig(max_new_tokens=self.max_new_tokens)
        prediction = pl_module.generate_texts(batch, settings)
        prediction_shuffled = pl_module.generate_texts(shuffled, settings)
        # Index of each question's first image, then the total, which `strict=False` leaves out.
        first = accumulate(batch.n_images, initial=0)
        images = [batch.images[i].cpu() if n else None for i, n in zip(first, batch.n_images, strict=False)]
        return [
            AnsweredQuestion(*row)
            for row in zip(batch.tasks, images, batch.targets, prediction, prediction_shuffled, strict=True)
        ]

    def _write(
        self, trainer: L.Trainer, pl_module: KosmosLit, answers: Sequence[AnsweredQuestion], n_parameters: int
    ) -> None:
        folder = Path(trainer.default_root_dir)
        by_task: dict[str, list[AnsweredQuestion]] = defaultdict(list)
        for a in answers:
            by_task[a.task].append(a)
        counted = [a for a in answers if a.task in self.tasks]  # `exact_match` covers these tasks alone
        metrics = {
            "exact_match": exact_match(counted),
            "exact_match_shuffled": exact_match_shuffled(counted),
            "n_questions": len(counted),
            "n_distinct": len({a.target for a in counted}),
            "tasks": {
                task: {"n": len(rows), "exact_match": exact_match(rows), "exact_match_shuffled": exact_match_shuffled(rows)}
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
            for a in answers:
                row = {
                    "task": a.task,
                    "target": a.target,
                    "prediction": a.prediction,
                    "prediction_shuffled": a.prediction_shuffled,
                }
                file.write(json.dumps(row) + "\n")
        # An equal share of the sheet for each task.
        per_task = max(1, self.sheet // max(1, len(by_task)))
        draw_contact_sheet([a for rows in by_task.values() for a in rows[:per_task]]).save(folder / "sheet.png")
        print(format_metrics(metrics))
        print(f"wrote {folder / 'report.json'}, {folder / 'answers.jsonl'} and {folder / 'sheet.png'}")


def _question_batches(trainer: L.Trainer) -> Iterator[PromptBatch]:
    """Yield the data module's questions, or log why there are none: training is over, so that this is no error."""
    try:
        yield from trainer.datamodule.predict_dataloader()  # type: ignore[attr-defined]
    except UserError as error:
        rank_zero_info(f"the report has no answers: {error}")


def exact_match(answers: Sequence[AnsweredQuestion]) -> float:
    """Return the share of predictions that equal their targets."""
    return round(sum(a.prediction == a.target for a in answers) / max(1, len(answers)), 4)


def exact_match_shuffled(answers: Sequence[AnsweredQuestion]) -> float:
    """Return the share of predictions from a shuffled image that equal their targets."""
    return round(sum(a.prediction_shuffled == a.target for a in answers) / max(1, len(answers)), 4)


def validation_losses(trainer: L.Trainer) -> dict[str, float]:
    """Return the last validation's loss of each corpus, in nats per token."""
    prefix = "val/loss/"
    return {k.removeprefix(prefix): round(float(v), 4) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the metrics as tables for a terminal."""
    counted = metrics | {"n": metrics["n_questions"]}
    tasks = [
        (name, row["n"], f"{row['exact_match']:.3f}", f"{row['exact_match_shuffled']:.3f}")
        for name, row in (metrics["tasks"] | {"counted": counted}).items()
    ]
    before, after = metrics["loss_before"], metrics["loss_after"]
    # NaN without a validation before training.
    losses = [(name, f"{before.get(name, math.nan):.3f}", f"{loss:.3f}") for name, loss in after.items()]
    return "\n".join(
        [
            "",
            table(("task", "questions", "exact match", "images shuffled"), tasks),
            f"{metrics['n_distinct']} distinct targets are counted",
            "",
            table(("corpus", "loss before", "after"), losses),
            "validation losses in nats per token",
            "",
            f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['parameters']:,} parameters, seed {metrics['seed']}",
            metrics["machine"],
        ]
    )


def draw_contact_sheet(answers: Sequence[AnsweredQuestion], columns: int = 4, side: int = 144) -> Image.Image:
    """Return a contact sheet of images, each with its target in grey and its prediction in green or red."""
    # Room for two lines of target and two of prediction below an image.
    width, height = side + 116, side + 76
    rows = -(-len(answers) // columns)  # rounded up
    # One row at least: PIL cannot write an image without pixels.
    sheet = Image.new("RGB", (columns * width, max(1, rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, a in enumerate(answers):
        x, y = i % columns * width + 8, i // columns * height + 8
        if a.image is not None:  # a question without images has an empty frame
            # PIL reads (H, W, 3).
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
    at = at if at > 0 else width  # a word longer than the line is cut
    return f"{text[:at]}\n{text[at:].strip()[:width]}"
