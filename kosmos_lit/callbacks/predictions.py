"""What `predict` writes: one JSON object a line with task, prompt, right answer and the model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from kosmos_lit.batch import PromptBatch


class Predictions(BasePredictionWriter):
    """Writes `predictions.jsonl` in the run's folder, a file per rank if there are several."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._path(trainer).unlink(missing_ok=True)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[str],
        batch_indices: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = zip(batch.tasks, batch.prompts, batch.answers, prediction, strict=True)
        with path.open("a", encoding="utf-8") as file:
            for task, prompt, answer, generated in rows:
                row = {"task": task, "prompt": prompt, "answer": answer, "generated": generated}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"wrote {self._path(trainer)}")

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        rank = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        return Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
