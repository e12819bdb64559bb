"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.lit import KosmosLit

NAME = re.compile(r"step=(\d{8,})\.ckpt")
"""Names of the files that `Checkpoints` writes."""
KEEP = ".keep"
"""Suffix of an empty file beside a checkpoint that is kept for good."""


class Checkpoints(ModelCheckpoint):
    """Writes a checkpoint every N optimizer steps and at the last one, and keeps the newest.

    Only whole steps are written, as only those resume exactly. None is once the gradient is not finite.

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
        self._step = 0
        self._written: int | None = None  # the last step of which this process wrote a checkpoint

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        # Lightning's `step` is the last one that was logged, which may be older.
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def write_now(self, trainer: L.Trainer) -> Path | None:
        """Write a checkpoint of the step that has just ended, unless there is one. Collective: all ranks must call it.

        Returns: its path; None for a trial run, which writes none.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        if self._written != trainer.global_step:
            assert isinstance(trainer.lightning_module, KosmosLit)
            trainer.lightning_module.check_finite()
            trainer.save_checkpoint(path, weights_only=False)
            self._written = trainer.global_step
            self._remove_old(trainer, 1)
        return Path(path)

    def _remove_old(self, trainer: L.Trainer, n_more: int = 0) -> None:
        """Remove all checkpoints up to this step but the newest ones, `keep` of them and a number more.

        Those of later steps are of a run that went on from an earlier one: it will come to them.
        """
        if not trainer.is_global_zero or self.keep == -1:
            return
        steps = {s: p for s, p in self._on_disk().items() if s <= trainer.global_step and not p.with_suffix(KEEP).exists()}
        for step in sorted(steps)[: -self.keep - n_more]:
            trainer.strategy.remove_checkpoint(steps[step])

    def _on_disk(self) -> dict[int, Path]:
        """Return checkpoints by step."""
        paths = Path(self.dirpath or "").glob("*.ckpt")
        return {int(m[1]): path for path in paths if (m := NAME.fullmatch(path.name))}

    def keep_newest(self, trainer: L.Trainer) -> Path | None:
        """Keep the newest checkpoint before this step for good, beside the others; return its path, if there is one."""
        steps = {step: path for step, path in self._on_disk().items() if step < trainer.global_step}
        if not steps:
            return None
        newest = steps[max(steps)]
        if trainer.is_global_zero:
            newest.with_suffix(KEEP).touch()
        return newest

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KosmosLit)
        before, step = self._step, trainer.global_step
        self._step = step
        if step == before:
            return  # the step's other micro-batches are still to come
        if step % self.every_n_train_steps == 0:
            # Before writing: a broken checkpoint would push out a good one.
            pl_module.check_finite()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._written = step
            self._remove_old(trainer)
        elif step == trainer.max_steps:
            self.write_now(trainer)
