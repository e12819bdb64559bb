"""A callback for runs on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class CountValidation(Callback):
    """Writes how many batches each validation has into `validation-RANK.txt` of the run's folder, one number a line."""

    def __init__(self) -> None:
        self.n = 0

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.n += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with (Path(trainer.default_root_dir) / f"validation-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{self.n}\n")
        self.n = 0
