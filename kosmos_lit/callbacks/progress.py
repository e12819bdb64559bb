"""One line for every row of the log; on a terminal the newest line replaces the one before."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from kosmos_lit.batch import CORPORA
from kosmos_lit.lit import KosmosLit


class Progress(ProgressBar):
    """Shows step, losses, speed and time left; in a file or a pipe one line after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._started, self._first_step, self._shown = 0.0, 0, 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            print(*args, **kwargs, file=sys.stderr)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._shown = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, KosmosLit)
        step = trainer.global_step
        if step == self._shown or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._shown, metrics = step, trainer.callback_metrics
        self._line(
            f"step {trainer.global_step:,}/{trainer.max_steps:,}  {_losses(pl_module.step_loss.compute())}  "
            f"lr {float(metrics['lr']):.1e}  {float(metrics['tokens_per_second']):,.0f} tokens/s  "
            f"data wait {float(metrics['data_wait']):.0%}  {self._left(trainer)} left"
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        found = {k.removeprefix("val/"): v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if found:
            when = f"step {trainer.global_step:,} " if trainer.state.fn == "fit" else ""
            self._line(f"{when}validation  {_losses(found)}", keep=True)

    def on_train_end(self, *_: Any) -> None:
        self._line("", keep=True)

    def _left(self, trainer: L.Trainer) -> str:
        done = trainer.global_step - self._first_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (trainer.max_steps - trainer.global_step)
        hours, seconds = divmod(int(seconds), 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}" if hours else f"{seconds // 60}:{seconds % 60:02d}"

    def _line(self, text: str, *, keep: bool = False) -> None:
        if not self._enabled:
            return
        terminal = sys.stderr.isatty()
        if text or terminal:
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal and not keep else "\n", file=sys.stderr)
        sys.stderr.flush()


def _losses(figures: Mapping[str, Tensor]) -> str:
    each = [f"{name} {float(figures[key]):.3f}" for name in CORPORA if (key := f"loss/{name}") in figures]
    return f"loss {float(figures['loss']):.3f} ({', '.join(each)})"
