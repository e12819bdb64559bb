"""The output of `predict`: one JSON object per line with task, prompt, target and prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.batch import PromptBatch


class Predictions(Callback):
    """Writes `predictions.jsonl` into the run's folder; every rank generates all answers, rank 0 writes."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            path = self._path(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")  # emptied, as batches append to it

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Sequence[str],
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        rows = zip(batch.tasks, batch.prompts, batch.targets, outputs, strict=True)
        with self._path(trainer).open("a", encoding="utf-8") as file:
            for task, prompt, target, prediction in rows:
                row: dict[str, Any] = {"task": task, "prompt": prompt, "target": target, "prediction": prediction}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")  # readable in every script

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"wrote {self._path(trainer)}")

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "predictions.jsonl"
