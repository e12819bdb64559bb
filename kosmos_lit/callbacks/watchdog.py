"""A run that hangs ends, and says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.errors import UserError
from kosmos_lit.trainer_internals import started_ranks
from kosmos_lit.watchdog import Watch, answer_with_stacks


class Watchdog(Callback):
    """Ends a run with exit code 86 when one of its phases makes no progress for longer than it may.

    Before, each rank writes the stacks of its threads and of its loader's processes to stderr, and one of them what each
    rank did last, so that a rank that was stopped, killed or lost with its machine is named.
    """

    def __init__(
        self,
        min_seconds: float | None = 300.0,
        factor: float = 10.0,
        start_seconds: float = 3600.0,
        validation_seconds: float = 1800.0,
        evaluation_seconds: float = 7200.0,
        save_seconds: float = 1800.0,
    ) -> None:
        """Set how long a run may take without progress, in seconds.

        Args:
            min_seconds: Between two micro-batches, at least. None: nothing is watched.
            factor: Between two micro-batches, in times of the usual one, if that is longer.
            start_seconds: Until the first step is done: reading weights, compiling.
            validation_seconds: Between two batches of a validation.
            evaluation_seconds: For the tasks that are evaluated after a step.
            save_seconds: For a checkpoint.
        """
        limits = {
            "start": start_seconds,
            "step": min_seconds if min_seconds is not None else start_seconds,
            "validation": validation_seconds,
            "evaluation": evaluation_seconds,
            "save": save_seconds,
        }
        if wrong := [name for name, seconds in {**limits, "factor": factor}.items() if seconds <= 0]:
            raise UserError(f"watchdog: {wrong[0]} must be positive; min_seconds: null turns it off")
        self.limits, self.factor, self.is_on = limits, factor, min_seconds is not None
        self._watch: Watch | None = None
        self._has_stepped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.is_on or self._watch is not None:
            return
        answer_with_stacks()
        folder, rank, n_ranks = Path(trainer.default_root_dir), trainer.global_rank, trainer.world_size
        self._watch = Watch(folder, rank, n_ranks, self.limits, self.factor, lambda: started_ranks(trainer))
        self._has_stepped = False
        self._watch.start()

    def enter(self, phase: str, trainer: L.Trainer) -> None:
        """Tell of progress: a phase begins or goes on."""
        if self._watch is not None:
            self._watch.enter(phase if self._has_stepped or phase != "step" else "start", trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.enter("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._has_stepped = True
        self.enter("step", trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.enter("validation", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.enter("validation", trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.enter("step", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.enter("save", trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
