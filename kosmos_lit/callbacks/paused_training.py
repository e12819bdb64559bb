"""Looking at a model in the middle of its training, and leaving the run as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch

from kosmos_lit.callbacks.throughput import Throughput
from kosmos_lit.lit import KosmosLit


@contextmanager
def paused_training(trainer: L.Trainer, pl_module: KosmosLit) -> Iterator[None]:
    """Let modules evaluate, without gradients and off the clock; leave modes, random numbers and validation's figures."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            callback.pause(trainer)
    model = trainer.strategy.model or pl_module  # what the strategy has wrapped around the module too
    modes = [(module, module.training) for module in model.modules()]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            pl_module.val_loss.reset()
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])
        pl_module.val_loss.reset()
        for module, training in modes:
            module.training = training


def log_aside(trainer: L.Trainer, pl_module: KosmosLit, figures: Mapping[str, float]) -> None:
    """Write a row of its own: in the step's row Lightning would say the same again in every later one."""
    pl_module.log_dict(dict(figures), logger=False)  # for callbacks that watch a figure
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step)
        logger.save()
