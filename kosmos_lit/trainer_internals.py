"""Names of Lightning that it does not document, each behind a function; tests/kosmos_lit/test_trainer_internals.py has one
test for each.
"""

from __future__ import annotations

import subprocess
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


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


def cluster_environment(trainer: L.Trainer) -> ClusterEnvironment | None:
    """Return what started the ranks of a run, Slurm or Lightning's own launcher for example; None for one process."""
    return getattr(trainer.strategy, "cluster_environment", None)


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, and from broadcasting before each micro-batch whether rank 0 received one.

    Its handlers enter collectives, and save in the middle of a step; the broadcast waits for a GPU's queue to run empty.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def take_checkpoint_as_named(trainer: L.Trainer) -> None:
    """Load the checkpoint that was named, or none: under Slurm Lightning takes any `hpc_ckpt_N.ckpt` that lies about."""
    trainer._checkpoint_connector._select_ckpt_path = lambda state_fn, ckpt_path, **_: ckpt_path  # type: ignore[method-assign]


def log_step(trainer: L.Trainer) -> None:
    """Write what callbacks have logged of a step, as Lightning does after the last one's `on_train_batch_end`."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def started_ranks(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes of the ranks that this one has started."""
    launcher = trainer.strategy.launcher
    return [*getattr(launcher, "procs", []), *getattr(launcher, "released", [])]


def release_started_ranks(trainer: L.Trainer) -> None:
    """Let the ranks that this one has started end with any code: Lightning kills this one when one of them is not 0."""
    if (launcher := trainer.strategy.launcher) is not None and (ranks := getattr(launcher, "procs", [])):
        launcher.released = list(ranks)  # type: ignore[attr-defined]
        ranks.clear()  # the list that Lightning's observer goes through


def end_started_ranks(trainer: L.Trainer, seconds: float = 30.0) -> None:
    """Wait for the ranks that this one has started, and kill those that have not ended then."""
    release_started_ranks(trainer)
    for process in started_ranks(trainer):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def lr_schedulers(trainer: L.Trainer) -> list[Any]:
    """Return the learning-rate schedulers of a run."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]
