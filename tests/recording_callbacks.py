"""Callbacks that record a run for tests, in files of its folder."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.sharding.shards import checksum, local_shard
from kosmos_lit.tokenizer import IGNORE, PAD


class CountValidation(Callback):
    """Writes the number of batches of each validation to `validation-RANK.txt`, one number per line."""

    def __init__(self) -> None:
        self.n = 0

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.n += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with (Path(trainer.default_root_dir) / f"validation-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{self.n}\n")
        self.n = 0


class SendSignals(Callback):
    """Sends its own process signals on one rank, after a number of training or of validation batches."""

    def __init__(self, signals: list[str], rank: int = 0, batch: int = 1, hook: str = "on_train_batch_start") -> None:
        """Take the names of the signals, the rank, and after which call of the hook they come, from 1."""
        self.signals, self.rank, self.batch = signals, rank, batch
        self.n = 0
        setattr(self, hook, self._count)

    def _count(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.n += not trainer.sanity_checking
        if self.n == self.batch and trainer.global_rank == self.rank:
            self.n += 1
            for name in self.signals:
                signal.raise_signal(getattr(signal, name))


class BreakGradients(Callback):
    """Puts a NaN into a gradient of one rank, in the first micro-batch of given steps, counted from 1."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank
        self.weights: dict[int, torch.Tensor] = {}

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights[trainer.global_step] = local_shard(next(pl_module.parameters())).detach().clone()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        self.breaks = is_first and trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if self.breaks:
            loss.register_hook(lambda gradient: gradient * float("nan"))


class CountTrainingData(Callback):
    """Writes rows, positions, targets and images of all training steps to `training_data.json`, by source."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: KosmosBatch, batch_idx: int
    ) -> None:
        rows = batch.tokens.shape[0]
        real, supervised = batch.tokens != PAD, batch.targets != IGNORE
        n_images = torch.bincount(batch.slots[:, 0], minlength=rows)
        for row, source in enumerate(batch.sources):
            counts = {"rows": 1, "positions": real[row].sum(), "targets": supervised[row].sum(), "images": n_images[row]}
            self.counts.update({f"{source}.{name}": int(n) for name, n in counts.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "training_data.json"
        path.write_text(json.dumps(self.counts), encoding="utf-8")


class RecordGradients(Callback):
    """Writes how gradients lie in memory after each micro-batch to `gradients-RANK.json`: [storages, their bytes]."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        storages = [p.grad.untyped_storage() for p in pl_module.parameters() if p.grad is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.rows.append([len(sizes), sum(sizes.values())])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"gradients-{trainer.global_rank}.json"
        path.write_text(json.dumps(self.rows), encoding="utf-8")


class RecordWeights(Callback):
    """Writes the weights before training to `start.pt`, and what each rank holds to `held-RANK.json`.

    `held-RANK.json` has the number of trained, frozen and optimizer-state elements of the rank, dtypes of what trains
    with its state, and of what is frozen, and whether the embedding and a layer are sharded after each micro-batch.
    """

    def __init__(self) -> None:
        self.sharded: list[list[bool]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()  # a collective: every rank must call it
        if trainer.is_global_zero:
            torch.save(state, Path(trainer.default_root_dir) / "start.pt")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        decoder: Any = pl_module.net.decoder
        ends = (decoder.embed_tokens.weight, decoder.layers[0].final_layer_norm.weight)
        self.sharded.append([isinstance(parameter, DTensor) for parameter in ends])
        parameters = list(pl_module.parameters())
        state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
        held = {
            "trained": sum(local_shard(p).numel() for p in parameters if p.requires_grad),
            "frozen": sum(local_shard(p).numel() for p in parameters if not p.requires_grad),
            "state": sum(local_shard(value).numel() for value in state if value.ndim),  # Adam's step count has no dimension
            "dtypes": sorted({str(t.dtype) for t in [*(p for p in parameters if p.requires_grad), *state]}),
            "checksum": sum(int(checksum(local_shard(p))) for p in parameters if p.requires_grad),
            "sharded": self.sharded,
            "frozen_dtypes": sorted({str(p.dtype) for p in parameters if not p.requires_grad}),
        }
        path = Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json"
        path.write_text(json.dumps(held), encoding="utf-8")
