"""A fake run for tests of callbacks, with a clock, loader, ranks and metrics that the test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import KosmosConfig
from kosmos_lit.lit import KosmosLit


class Recorder(KosmosLit):
    """A module without a model that keeps all logged rows."""

    def __init__(self, config: KosmosConfig, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.rows: list[dict[str, float]] = []

    def log_dict(self, dictionary: Mapping[str, Any], **_: Any) -> None:  # type: ignore[override]
        self.rows.append({name: float(value) for name, value in dictionary.items()})


class FakeRun:
    """A trainer as a callback sees it."""

    def __init__(self, others: Sequence[Sequence[float]] = (), **fields: Any) -> None:
        """Begin at second 1000; `others` are the values of the ranks after this one, rank 0."""
        self.now = 1000.0

        def reduce(rows: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            assert not rows[1:].any()
            return torch.cat([rows[:1], torch.tensor(others, dtype=torch.float64)])

        settings = {
            "global_step": 0,
            "max_steps": 100,
            "log_every_n_steps": 2,
            "world_size": 1 + len(others),
            "global_rank": 0,
            "precision": "32-true",
            "strategy": SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce),
            "train_dataloader": SimpleNamespace(waited_seconds=0.0),
            "is_global_zero": True,
            "callback_metrics": {},
            "sanity_checking": False,
            "callbacks": [],
            "state": SimpleNamespace(fn="fit"),
        }
        self.trainer: Any = SimpleNamespace(**(settings | fields))

    def clock(self) -> float:
        return self.now

    def micro_batch(
        self,
        callback: Any,
        module: KosmosLit,
        batch: KosmosBatch,
        *,
        wait: float = 0.0,
        takes: float = 1.0,
        ends: bool = True,
    ) -> None:
        """Wait for a micro-batch, and train on it; `ends` marks the step's last."""
        self.now += wait
        self.trainer.train_dataloader.waited_seconds += wait
        callback.on_train_batch_start(self.trainer, module, batch, 0)
        self.now += takes
        self.trainer.global_step += ends
        callback.on_train_batch_end(self.trainer, module, None, batch, 0)
