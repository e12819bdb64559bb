"""Callbacks that record what a run does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.sharding.shards import local_shard
from kosmos_lit.tokenizer import IGNORE, PAD


class CountValidation(Callback):
    """Writes how many batches each validation has into `validation-RANK.txt` of the run's folder, one number a line."""

    def __init__(self) -> None:
        self.n = 0

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.n += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with (Path(trainer.default_root_dir) / f"validation-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{self.n}\n")
        self.n = 0


class CountReading(Callback):
    """Writes what the steps of a run have read into `reading.json` of its folder: by source, and in all."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: KosmosBatch, batch_idx: int
    ) -> None:
        rows = batch.tokens.shape[0]
        real, learnt = batch.tokens != PAD, batch.targets != IGNORE
        of_row = torch.bincount(batch.slots[:, 0], minlength=rows)
        for row, source in enumerate(batch.sources):
            counts = {"rows": 1, "positions": real[row].sum(), "targets": learnt[row].sum(), "images": of_row[row]}
            self.read.update({f"{source}.{name}": int(n) for name, n in counts.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (Path(trainer.default_root_dir) / "reading.json").write_text(json.dumps(self.read), encoding="utf-8")


class Witness(Callback):
    """Writes the weights that training starts from, and the size of each rank's shards, into the run's folder.

    `start.pt`: the full weights. `held-RANK.json`: a rank's elements of trained and of frozen parameters and of the
    optimizer's state, and their dtypes.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()  # a collective
        if trainer.is_global_zero:
            torch.save(state, Path(trainer.default_root_dir) / "start.pt")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        parameters = list(pl_module.parameters())
        state = [v for values in trainer.optimizers[0].state.values() for v in values.values()]
        counts = {
            "trained": sum(local_shard(p).numel() for p in parameters if p.requires_grad),
            "frozen": sum(local_shard(p).numel() for p in parameters if not p.requires_grad),
            "state": sum(local_shard(v).numel() for v in state if v.ndim),
            "dtypes": sorted({str(t.dtype) for t in [*parameters, *state]}),
        }
        path = Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json"
        path.write_text(json.dumps(counts), encoding="utf-8")
