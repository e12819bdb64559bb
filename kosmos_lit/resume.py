"""Resume: a run continues at a whole optimizer step, with its own settings and the checkpoint's trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning as L

from kosmos_lit.config import OptimizerConfig
from kosmos_lit.errors import UserError
from kosmos_lit.trainer_internals import lr_schedulers, set_batch_progress


def start_at_step(trainer: L.Trainer, config: OptimizerConfig, rate: Callable[[int], float]) -> None:
    """Start training at the trainer's optimizer step with this run's optimizer settings.

    Args:
        trainer: at the start of training, after a checkpoint, if any, was loaded.
        config: settings that replace those in the optimizer's loaded state.
        rate: fraction of the peak learning rate at a step.
    """
    step = trainer.global_step
    # The checkpoint counts micro-batches of its own size; this run may accumulate another number of them per step.
    set_batch_progress(trainer, step * trainer.accumulate_grad_batches)
    # The optimizer's loaded state holds the checkpoint's settings.
    settings = {"initial_lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    for group in trainer.optimizers[0].param_groups:
        # The schedule sets the rate after each step, so the next step's is set by hand.
        group |= settings | {"lr": config.lr * rate(step)}
    for scheduler in lr_schedulers(trainer):
        # Loaded as well; later rates are factors of these.
        scheduler.base_lrs = [config.lr] * len(scheduler.base_lrs)


def check_trained(saved: Sequence[str], current: Sequence[str]) -> None:
    """Make sure that a run trains the parameters whose optimizer state the checkpoint holds.

    Raises: UserError naming a parameter that differs.
    """
    # In order: the optimizer's state is stored by a parameter's index.
    if list(saved) == list(current):
        return
    differing = sorted(set(saved) ^ set(current))
    raise UserError(
        f"the checkpoint's run trained {len(saved)} parameters, this one {len(current)}, {differing[0]} for one differs: "
        "resume with that run's model.freeze and vision.trainable, or start anew from its weights with model.init_from"
    )


def kernel_change(saved: str | None, current: str) -> str | None:
    """Return a sentence for a run that computes attention by another kernel than its checkpoint's run; None if it does not.

    Args:
        saved: the checkpoint's kernel; None in those of earlier versions.
        current: the run's.
    """
    if saved is None or saved == current:
        return None
    return (
        f"resume: attention was computed by {saved} so far, and is by {current} from here on: the same formula, rounded at "
        "other places, so losses are not bit for bit those of a run that went on"
    )
