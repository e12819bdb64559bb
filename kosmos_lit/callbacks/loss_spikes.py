"""Leaps of the loss: named with their rows, and the checkpoint before one is kept."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.callbacks.checkpoints import Checkpoints
from kosmos_lit.errors import UserError

LOSS = "train/loss/"
FILE = "spikes.jsonl"
"""In the run's folder: a line for each leap."""
TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution in medians of the absolute deviation from its median."""


class LossSpikes(Callback):
    """Watches each corpus's loss at the rows of the log.

    A loss is a spike if it lies far above the median of the last rows, measured by the median of their absolute deviations
    from it, which earlier spikes hardly move. Its step and rows are printed and added to `spikes.jsonl`.
    """

    def __init__(self, sigmas: float | None = 8.0, window: int = 128, min_rows: int = 32) -> None:
        """Set what a spike is.

        Args:
            sigmas: Standard deviations above the median. None: nothing is watched.
            window: Rows of the log that are looked back on.
            min_rows: Rows of a corpus before which nothing counts as a spike.
        """
        if (sigmas is not None and sigmas <= 0) or not 2 <= min_rows <= window:
            raise UserError("loss_spikes: sigmas must be positive or null, and min_rows between 2 and window")
        self.sigmas, self.min_rows = sigmas, min_rows
        self._losses: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=window))
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._losses.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if self.sigmas is None or step == before or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        for key, value in trainer.callback_metrics.items():
            if key.startswith(LOSS) and math.isfinite(loss := float(value)):
                self._watch(trainer, pl_module, key.removeprefix(LOSS), loss)

    def _watch(self, trainer: L.Trainer, pl_module: Any, corpus: str, loss: float) -> None:
        losses = self._losses[corpus]
        if len(losses) >= self.min_rows:
            median = statistics.median(losses)
            sigma = TO_SIGMA * statistics.median(abs(x - median) for x in losses)
            assert self.sigmas is not None
            if loss > median + self.sigmas * max(sigma, 1e-3):  # nats: of a loss that hardly moves
                self._report(trainer, pl_module, corpus, loss, median)
        losses.append(loss)

    def _report(self, trainer: L.Trainer, pl_module: Any, corpus: str, loss: float, median: float) -> None:
        kept = [c.keep_newest(trainer) for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        last = self._step * pl_module.rows_per_step - 1
        rows = [last - pl_module.rows_per_step + 1, last]
        row = {"step": self._step, "corpus": corpus, "loss": loss, "median": median, "rows": rows}
        row |= {"kept": str(kept[0]) if any(kept) else None}
        if not trainer.is_global_zero:
            return
        with (Path(trainer.default_root_dir) / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        line = f"step {self._step:,} spike of the {corpus} loss: {loss:.3f}, median {median:.3f}; rows {rows[0]} to {last}"
        line += f"; {kept[0]} is kept" if any(kept) else ""
        if (bar := trainer.progress_bar_callback) is not None:
            bar.print(line)
