"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.lit import KosmosLit

NAME = re.compile(r"step=(\d{8,})\.ckpt")
"""Names of the files that `Checkpoints` writes."""


class Checkpoints(ModelCheckpoint):
    """Writes a checkpoint every N optimizer steps, at the last one, and on Ctrl-C or SIGTERM, and keeps the newest.

    After a signal the step ends first, as only whole steps resume exactly; a second signal stops at once. With several
    ranks the first signal stops at once too. No checkpoint is written once the gradient is not finite.

    What is kept is counted on disk, so that the files of earlier starts of a run, killed ones too, are among them.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 1000, keep: int = 2) -> None:
        """Set where and how often checkpoints are written.

        Args:
            dirpath: Folder of the checkpoints.
            every_n_train_steps: Optimizer steps from one to the next.
            keep: Checkpoints that are kept, the newest ones; -1: all. The last step's, or a signal's, is kept beside them.
        """
        if keep != -1 and keep < 1:
            raise UserError(f"Checkpoints: keep must be positive, or -1 for all, got {keep}")
        super().__init__(
            dirpath=dirpath,
            filename="step={step:08d}",  # zeros, so that names sort by step
            auto_insert_metric_name=False,  # else Lightning writes step=step=
            save_top_k=-1,  # all: `_remove_old` counts them on disk
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,  # after a resume a repeated step replaces its checkpoint
        )
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        # Lightning's `step` is the last one that was logged, which may be older.
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        # Ranks would receive a signal at different steps, and the first one to stop would leave the others waiting.
        # Python sets handlers in the main thread only.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._restore_handlers()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        # With the former handlers back, a second signal stops at once.
        self._signal = number
        print("\nending this step and writing a checkpoint; a second signal stops without one", file=sys.stderr)

    def _remove_old(self, trainer: L.Trainer, n: int) -> None:
        """Remove all checkpoints up to this step but the newest n.

        Those of later steps are of a run that went on from an earlier one: it will come to them.
        """
        if not trainer.is_global_zero:
            return
        assert self.dirpath is not None
        steps = {int(m[1]): path for path in Path(self.dirpath).glob("*.ckpt") if (m := NAME.fullmatch(path.name))}
        for step in sorted(s for s in steps if s <= trainer.global_step)[:-n]:
            trainer.strategy.remove_checkpoint(steps[step])

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KosmosLit)
        before, step = self._step, trainer.global_step
        self._step = step
        if step == before:
            return  # the step's other micro-batches are still to come
        regular = step % self.every_n_train_steps == 0
        last = (step == trainer.max_steps or self._signal is not None) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        # Before writing: a broken checkpoint would push out a good one.
        if regular or last:
            pl_module.check_finite()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Lightning writes the regular ones only.
        if last and not regular:
            trainer.save_checkpoint(self.format_checkpoint_name(self._monitor_candidates(trainer)), weights_only=False)
        if (regular or last) and self.keep != -1:
            self._remove_old(trainer, self.keep + (not regular))
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            sys.exit(128 + self._signal)  # a shell's status for a process that a signal ended
