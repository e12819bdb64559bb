"""Before training: all ranks run the same code with the same configuration, tokenizer and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import lightning as L

from kosmos_lit.agreement import check_same, code_version, is_distributed, short_hash


class IdentifiedData(Protocol):
    """A data module that says what decides its rows."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows, as plain data: equal on all ranks."""
        ...


def check_ranks(trainer: L.Trainer, hparams: Mapping[str, Any], data: IdentifiedData, tokenizer: str) -> None:
    """Check that a run is the same on all ranks. Collective: all ranks must call it.

    Args:
        trainer: of the run.
        hparams: of the model.
        data: its data module, set up.
        tokenizer: fingerprint.

    Raises: UserError naming what differs on which ranks; other ranks than the first exit.
    """
    if not is_distributed():
        return
    t = trainer
    settings = (t.max_steps, t.max_epochs, t.accumulate_grad_batches, t.val_check_interval, t.gradient_clip_val)
    identity = {
        "code": code_version(),
        "tokenizer": tokenizer,
        "data": short_hash(data.identity()),
        "configuration": short_hash([dict(hparams), settings, t.state.fn, t.precision, type(t.strategy).__name__]),
    }
    check_same(identity, "All ranks need the same code, files and command")
