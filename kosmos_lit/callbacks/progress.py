"""Progress of a run: one line per row of the log; on a terminal a bar with the latest metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from kosmos_lit.batch import CORPORA
from kosmos_lit.lit import KosmosLit
from kosmos_lit.terminal import clock_time, write_line

BAR = 10
"""Width of the bar in characters."""
REDRAW_SECONDS = 0.1
"""Shortest time between two drawings of the bar."""


class Progress(ProgressBar):
    """Shows step, losses, speed, data wait and time left; a file or a pipe gets one line after the other.

    Metrics are those of the last row of the log; between rows only the step changes, as reading a loss from the device
    would stall it. Only rank 0 prints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], float] = time.monotonic
        self._enabled = True
        self._step, self._metrics, self._drawn_at = 0, "", 0.0

    # Lightning calls this on all ranks but 0.
    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # Lightning's `self.print` of a module comes through this method.
    def print(self, *args: Any, **kwargs: Any) -> None:
        self._line(kwargs.get("sep", " ").join(map(str, args)), keep=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step, self._metrics, self._drawn_at = trainer.global_step, "", 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, KosmosLit)
        step = trainer.global_step
        if step == self._step:
            return  # not the step's last micro-batch
        self._step, is_row = step, step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_row:  # on all ranks: `compute` reduces the loss over them
            self._metrics = _format_row(pl_module.step_loss.compute(), trainer.callback_metrics)
        if is_row or (sys.stderr.isatty() and self.clock() - self._drawn_at >= REDRAW_SECONDS):
            self._drawn_at = self.clock()
            self._line(f"{self._bar(trainer)}step {step:,}{_of_steps(trainer)}  {self._metrics}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        losses = {k.removeprefix("val/"): v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if losses:
            when = f"step {trainer.global_step:,} " if trainer.state.fn == "fit" else ""
            self._line(f"{when}validation  {_losses(losses)}", keep=True)

    def on_train_end(self, *_: Any) -> None:
        self._line("", keep=True)  # ends the bar's line

    @staticmethod
    def _bar(trainer: L.Trainer) -> str:
        if trainer.max_steps <= 0 or not sys.stderr.isatty():
            return ""
        n_done = BAR * trainer.global_step // trainer.max_steps
        return f"[{'#' * n_done}{'.' * (BAR - n_done)}] "

    def _line(self, text: str, *, keep: bool = False) -> None:
        """Print a line; on a terminal it replaces the one before, and the next one replaces it unless `keep`."""
        if self._enabled:
            write_line(text, keep=keep)


def _of_steps(trainer: L.Trainer) -> str:
    return f"/{trainer.max_steps:,}" if trainer.max_steps > 0 else ""


def _format_row(losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> str:
    """Return the text of a row; on a terminal the losses by corpus come last, as a narrow one cuts them off."""
    speeds = _speeds(metrics)
    if sys.stderr.isatty():
        return "  ".join([_loss(losses), *speeds, _by_corpus(losses)])
    return "  ".join([_losses(losses), *speeds])


def _losses(losses: Mapping[str, Tensor]) -> str:
    return f"{_loss(losses)} ({_by_corpus(losses)})"


def _loss(losses: Mapping[str, Tensor]) -> str:
    return f"loss {float(losses['loss']):.3f}"


def _by_corpus(losses: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(losses[key]):.3f}" for name in CORPORA if (key := f"loss/{name}") in losses)


def _speeds(metrics: Mapping[str, Tensor]) -> list[str]:
    """Return the metrics of StepLog and Throughput, if the run has them, most important first."""
    forms: dict[str, Callable[[float], str]] = {
        "tokens_per_second": lambda rate: f"{rate:,.0f} tokens/s",
        "data_wait": lambda share: f"data wait {share:.0%}",
        "seconds_left": lambda seconds: f"{clock_time(seconds)} left",
        "peak_share": lambda share: f"{share:.0%} of peak",
        "lr": lambda rate: f"lr {rate:.1e}",
    }
    return [form(float(metrics[name])) for name, form in forms.items() if name in metrics]
