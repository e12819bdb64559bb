"""Metrics of a training step: losses, learning rate, gradient norm, mixture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.batch import CORPORA, KosmosBatch
from kosmos_lit.callbacks.ranks import gather_values
from kosmos_lit.lit import KosmosLit

DIGEST_MODULUS = 1 << 24
"""Logged numbers are float32, which is exact for integers up to here."""


class StepLog(Callback):
    """Logs one row every `log_every_n_steps` optimizer steps.

    Losses are those of that step's global batch, NaN for a corpus that the batch does not contain. `mix` is the share of
    each corpus kind and of each named source since the process started, in the mixture's unit; `bad` counts each source's
    bad images and blocked documents since then (the ledger lists them with reasons), `bad_images` the bad images since the
    last row. `rows` is 24 bits of the digest of all rows so far: equal in two runs that read the same rows.
    """

    def __init__(self) -> None:
        self._step = self._bad_images = 0
        self._mix: Counter[str] = Counter()  # by source
        self._bad: Counter[str] = Counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: KosmosBatch, batch_idx: int
    ) -> None:
        self._bad_images += batch.n_bad_images
        for source, amount in zip(batch.sources, batch.amounts, strict=True):
            self._mix[source] += amount
        self._bad.update(source for source, _ in batch.bad)
        if trainer.global_step == self._step:
            return  # not the step's last micro-batch
        self._step = trainer.global_step
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        # A row reads numbers from the device anyway.
        pl_module.check_finite()
        sources = list(pl_module.kinds)  # in one order on all ranks
        counted = [count[name] for count in (self._mix, self._bad) for name in sources]
        # Reduced before the sum, which float64 keeps exact up to 2 ** 53 only, and again after it.
        own = [pl_module.rows_digest % DIGEST_MODULUS, self._bad_images, *counted]
        digest, bad, *counts = gather_values(trainer, own).sum(0).tolist()
        amounts, bad_samples = counts[: len(sources)], counts[len(sources) :]
        losses = {f"train/{k}": v.float() for k, v in pl_module.step_loss.compute().items()}
        metrics: dict[str, Any] = (
            # Defaults first: losses of this step replace them.
            _nan_losses(pl_module.kinds)
            | losses
            | {
                "step": float(self._step),
                "lr": pl_module.lr,
                "bad_images": bad,
                "rows": digest % DIGEST_MODULUS,
            }
        )
        if pl_module.grad_norm is not None:
            metrics["grad_norm"] = pl_module.grad_norm
        metrics |= _shares(pl_module.kinds, amounts)
        metrics |= {f"bad/{name}": count for name, count in zip(sources, bad_samples, strict=True)}
        pl_module.log_dict(metrics)
        self._bad_images = 0


def _nan_losses(kinds: Mapping[str, int]) -> dict[str, float]:
    """Return NaN for the losses of all corpora, as defaults for a step without tokens of some."""
    # Lightning would repeat the value of the last step that logged a key.
    names = [CORPORA[kind] for kind in kinds.values()]
    return {f"train/{metric}/{name}": math.nan for metric in ("loss", "bits_per_byte") for name in names}


def _shares(kinds: Mapping[str, int], amounts: Sequence[float]) -> dict[str, float]:
    """Return the share of each corpus kind, and of each source that is not named after its kind."""
    total = sum(amounts) or 1.0  # 1 while no row has been counted
    shares = {f"mix/{name}": 0.0 for name in CORPORA}
    for (source, kind), amount in zip(kinds.items(), amounts, strict=True):
        shares[f"mix/{CORPORA[kind]}"] += amount / total
        # A source named after its kind would repeat the kind's key.
        if source not in CORPORA:
            shares[f"mix/{CORPORA[kind]}/{source}"] = amount / total
    return shares
