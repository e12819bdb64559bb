"""A run ends at a signal as one: all ranks after the same step, with a checkpoint."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from kosmos_lit.callbacks.checkpoints import Checkpoints
from kosmos_lit.interruption import EXIT_CODES, Interruption
from kosmos_lit.trainer_internals import log_step, release_started_ranks


class EndAtSignals(Callback):
    """Ends a run at SIGINT, SIGTERM or SIGUSR1 on any rank, after a step or a validation batch.

    All ranks agree on the signal, write a checkpoint of the step, wait for each other, and exit: 130, 143 and 85.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self.interruption.defer()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if step != before:
            self._end_if_asked(trainer, in_step=True)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # The batches of the sanity check, before training, end at once.
        if not trainer.sanity_checking:
            self._end_if_asked(trainer, in_step=False)

    def _end_if_asked(self, trainer: L.Trainer, *, in_step: bool) -> None:
        number = self.interruption.agreed()
        if number is None:
            return
        # Before the checkpoint: this step's row would be missing from the log of the resumed run.
        if in_step:
            log_step(trainer)
        written = [c.write_now(trainer) for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        what = f"checkpoint {written[0]}" if any(written) else "without a checkpoint"
        rank_zero_info(f"{number.name}: ended after step {trainer.global_step}, {what}, exit code {EXIT_CODES[number]}")
        release_started_ranks(trainer)
        self.interruption.end(number)
