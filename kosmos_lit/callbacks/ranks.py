"""Values of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor


def gather_values(trainer: L.Trainer, values: Sequence[float]) -> Tensor:
    """Return every rank's values, (ranks, values) float64 on the host. Collective: all ranks must call it."""
    table = torch.zeros(trainer.world_size, len(values), dtype=torch.float64)  # float64: exact for counts up to 2 ** 53
    table[trainer.global_rank] = torch.tensor(values, dtype=torch.float64)
    if trainer.world_size > 1:  # a sum with the other ranks' zeros gathers all
        table = trainer.strategy.reduce(table.to(trainer.strategy.root_device), reduce_op="sum").cpu()
    return table
