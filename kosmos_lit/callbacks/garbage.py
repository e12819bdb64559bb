"""Python's collector of reference cycles, run by all ranks at the same steps."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.errors import UserError


class GarbageCollection(Callback):
    """Runs Python's garbage collector after every N optimizer steps and after validations, and at no other time of training.

    Left alone, it stops a rank's Python at moments of its own for as long as it takes to visit every object, while the
    other ranks wait in their next collective. What exists when training starts, modules among it, is not visited any more.
    Nothing that is computed depends on it.
    """

    def __init__(self, every_n_steps: int | None = 100) -> None:
        """Set when it runs.

        Args:
            every_n_steps: Optimizer steps from one collection to the next. None: Python decides, as without this callback.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"garbage_collection.every_n_steps must be positive, or null, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._is_scheduled = self._has_frozen = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        # Where somebody else has turned it off, it stays so.
        if self.every_n_steps is not None and gc.isenabled():
            gc.collect()
            # What was frozen by somebody else could not be told from this when it is unfrozen.
            self._has_frozen = gc.get_freeze_count() == 0
            if self._has_frozen:
                gc.freeze()
            gc.disable()
            self._is_scheduled = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if self._is_scheduled and step != before and step % (self.every_n_steps or 1) == 0:
            gc.collect()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_scheduled:
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._is_scheduled:
            if self._has_frozen:
                gc.unfreeze()
            gc.enable()
            self._is_scheduled = self._has_frozen = False
