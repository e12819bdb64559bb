"""What the data module reads and sets in Lightning's Trainer: in this file alone, as Lightning does not document it.

Each name has a test in tests/datamodules/test_trainer.py, which fails where a new Lightning gives it another meaning.
"""

from __future__ import annotations

import lightning as L

from kosmos_lit.errors import UserError


def set_accumulation(trainer: L.Trainer, n_micro_batches: int, reason: str) -> None:
    """Make each optimizer step `n_micro_batches` micro-batches; `reason` explains the number in a message.

    Raises: UserError if the trainer was configured with another number.
    """
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but it follows from the data's "
            f"numbers: {reason} make {n_micro_batches}; leave it out"
        )
    # The training loop reads this at each micro-batch: `setup` is early enough.
    trainer.accumulate_grad_batches = n_micro_batches
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval *= n_micro_batches  # Lightning counts micro-batches there, and configs steps


def limit_steps(trainer: L.Trainer, last_step: int) -> bool:
    """End training with `last_step`; return False, and change nothing, if it ends no later anyway."""
    loop = trainer.fit_loop.epoch_loop  # `trainer.max_steps` reads this and has no setter
    if 0 <= loop.max_steps <= last_step:  # Lightning's -1 is no limit
        return False
    loop.max_steps = last_step
    return True


def is_fitting(trainer: L.Trainer) -> bool:
    """Return whether the trainer runs `fit`, not validation, a test or prediction."""
    return trainer.state.fn == "fit"


def resumed_checkpoint(trainer: L.Trainer) -> str | None:
    """Return the path of the checkpoint that the trainer goes on from, from before its data state is loaded."""
    return None if trainer.ckpt_path is None else str(trainer.ckpt_path)
