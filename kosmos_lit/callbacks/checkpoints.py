"""When checkpoints are written, and how many stay."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Writes a checkpoint every N optimizer steps, at the last one, and on Ctrl-C, and keeps the newest.

    Ctrl-C lets the step end first, as only whole steps can be resumed exactly; a second one stops at once. With several
    ranks it stops at once too: they would end at different steps.
    """

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
            enable_version_counter=False,  # a step that is done again replaces its checkpoint
        )
        self.every_n_train_steps = every_n_train_steps
        self._interrupted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        in_main_thread = threading.current_thread() is threading.main_thread()
        if trainer.world_size == 1 and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._interrupted = True
        print("\nending this step and writing a checkpoint; press Ctrl-C again to stop without", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        before = self._step
        step, self._step = trainer.global_step, trainer.global_step
        if step == before:
            return  # the step's other micro-batches are still to come
        if step % self.every_n_train_steps and (step == trainer.max_steps or self._interrupted):
            trainer.save_checkpoint(self.format_checkpoint_name({"step": torch.tensor(step)}), weights_only=False)
        if self._interrupted:
            raise KeyboardInterrupt
