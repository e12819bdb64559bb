"""When checkpoints are written, and how many stay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Writes a checkpoint every N optimizer steps and at the last one, and keeps the newest."""

    def __init__(self, dirpath: str, every_n_train_steps: int = 1000, keep: int = 2) -> None:
        """Choose where and how often.

        Args:
            dirpath: Folder of the checkpoints.
            every_n_train_steps: Optimizer steps from one to the next.
            keep: How many stay, beside the last step's.
        """
        super().__init__(
            dirpath=dirpath,
            filename="step={step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
        )
        self.every_n_train_steps = every_n_train_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if step == trainer.max_steps and step % self.every_n_train_steps:
            trainer.save_checkpoint(self.format_checkpoint_name({"step": torch.tensor(step)}))
