"""Evaluation in the middle of training that leaves the run as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch

from kosmos_lit.callbacks.throughput import Throughput
from kosmos_lit.callbacks.watchdog import Watchdog
from kosmos_lit.lit import KosmosLit


@contextmanager
def isolated_evaluation(trainer: L.Trainer, pl_module: KosmosLit) -> Iterator[None]:
    """Enter evaluation mode without gradients and off the throughput's clock.

    Restores modes, random states and validation's metrics, so that losses and weights are those of a run without it.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            callback.pause(trainer)
    watchdogs = [c for c in trainer.callbacks if isinstance(c, Watchdog)]  # type: ignore[attr-defined]
    for watchdog in watchdogs:
        watchdog.enter("evaluation", trainer)
    model = trainer.strategy.model or pl_module  # with the wrappers that a strategy adds around the module
    modes = [(module, module.training) for module in model.modules()]
    # By default fork_rng would save the state of every GPU of the machine.
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            pl_module.val_loss.reset()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        # Validation sums into the same metric.
        pl_module.val_loss.reset()
        for module, training in modes:
            module.training = training
        for watchdog in watchdogs:
            watchdog.enter("step", trainer)


def log_separate_row(trainer: L.Trainer, pl_module: KosmosLit, metrics: Mapping[str, float]) -> None:
    """Log metrics as a row of their own."""
    # In the step's row Lightning would repeat them in every later row.
    pl_module.log_dict(dict(metrics), logger=False)  # for callbacks that monitor a metric
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()
