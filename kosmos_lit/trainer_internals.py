"""Names of Lightning that it does not document, each behind a function; tests/kosmos_lit/test_trainer_internals.py has one
test for each.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning as L


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return a module's trainer, or None outside a run, where the public `module.trainer` raises."""
    return module._trainer


def loss_scaler(trainer: L.Trainer) -> object | None:
    """Return the gradient scaler of float16 training, or None for a precision that has none."""
    # Only the mixed-precision plugin has the attribute, which is None for bfloat16.
    return getattr(trainer.precision_plugin, "scaler", None)


def has_bucket_views(trainer: L.Trainer) -> bool:
    """Return whether the gradients of a run are views of the buckets that DDP sums over ranks."""
    # What `DDPStrategy(gradient_as_bucket_view=True)` passes on; only its DDP module, made later, has a public attribute.
    return bool(getattr(trainer.strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view", False))


def set_batch_progress(trainer: L.Trainer, n_batches: int) -> None:
    """Set the training loop's counts of micro-batches to `n_batches`, before the first one of a run."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    # `current` numbers batches within the epoch, `total` over all epochs.
    for counts in (progress.current, progress.total):
        shift = n_batches - counts.ready
        for name, count in vars(counts).items():  # ready, started, processed, completed
            setattr(counts, name, count + shift)


def end_at_sigterm(trainer: L.Trainer) -> None:
    """Let SIGTERM end a rank at once, and the ranks that it started. For the time of a `fit` on several ranks.

    Lightning broadcasts before each micro-batch whether rank 0 has received the signal, and reads the answer: the host would
    wait for a GPU's queue to run empty each time. What starts ranks on several nodes sends the signal to all of them.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def end(number: int, frame: FrameType | None) -> None:
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        sys.exit(128 + number)  # a shell's status for a process that a signal ended

    # Python sets handlers in the main thread only. Lightning restores the former one when the run ends.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def lr_schedulers(trainer: L.Trainer) -> list[Any]:
    """Return the learning-rate schedulers of a run."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]
