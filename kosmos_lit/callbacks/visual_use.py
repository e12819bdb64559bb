"""How much of what a model predicts it has seen: the same held-out tokens with other images, and with none."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from kosmos_lit.batch import CORPORA, KosmosBatch
from kosmos_lit.callbacks.paused_training import log_aside, paused_training
from kosmos_lit.callbacks.ranks import gather
from kosmos_lit.errors import UserError
from kosmos_lit.lit import KosmosLit

TEXT = CORPORA.index("text")
Losses = dict[str, float]
"""Nats a token, by corpus."""


class HasHeldOut(Protocol):
    """What a data module owes the gauge."""

    def val_dataloader(self) -> Any:
        """Return the held-out rows of this rank, equally many batches on all ranks."""


class VisualUse(Callback):
    """Logs every N optimizer steps what the loss of held-out rows owes to their images, in nats a token.

    Three losses of the same tokens, of each corpus that has images: `val/visual_use/CORPUS/true` with the images that
    are there, `shuffled` with each image in another one's place, `blank` with an even image of the tower's mean colour.
    `gain_shuffled` and `gain_blank` are how much worse these two are: near 0, the model does not look. A model can get
    something from any image (that it is a photograph, of a page's kind), which only `gain_blank` shows; what it gets from
    the right one is `gain_shuffled`.

    The rows are read once, and kept on the host. Random numbers, modes and the other logs stay as they are without a gauge.
    """

    def __init__(self, every_n_steps: int = 1000, batches: int = 4) -> None:
        """Choose how often and how much.

        Args:
            every_n_steps: Optimizer steps from one reading to the next; each is made at the next row of the log.
            batches: Micro-batches of each corpus on each rank; a reading puts them through the model three times.

        Raises: UserError if one is not positive.
        """
        if every_n_steps <= 0 or batches <= 0:
            raise UserError(f"VisualUse: every_n_steps {every_n_steps} and batches {batches} must be positive")
        self.every_n_steps, self.batches = every_n_steps, batches
        self._step = self._read_at = 0
        self._rows: Gauged | None = None
        self._is_off = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        self._step = self._read_at = trainer.global_step
        self._rows = None
        self._is_off = not trainer.limit_val_batches or not set(pl_module.kinds.values()) - {TEXT}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KosmosLit)
        step, before = trainer.global_step, self._step
        self._step = step
        is_row = step != before and step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._is_off or not is_row or step // self.every_n_steps == self._read_at // self.every_n_steps:
            return
        self._read_at = step
        with paused_training(trainer, pl_module):
            rows = self._rows = self._rows or self._collect(trainer, pl_module)
            if rows is None:
                self._is_off = True
                rank_zero_info("VisualUse is off: on no rank two images are held out; raise a corpus's val_share")
                return
            found = _differences(*(_losses(trainer, pl_module, side) for side in rows.sides()))
        _log(trainer, pl_module, found)

    def _collect(self, trainer: L.Trainer, pl_module: KosmosLit) -> Gauged | None:
        """Keep the first batches with images of each corpus; ranks that have fewer than others get empty ones.

        Returns: None if no rank has two images.
        """
        data: HasHeldOut = trainer.datamodule  # type: ignore[attr-defined]
        kept: list[KosmosBatch] = []
        counts: Counter[int] = Counter()
        wanted = set(pl_module.kinds.values()) - {TEXT}
        spare: KosmosBatch | None = None
        for batch in data.val_dataloader():
            spare = batch if spare is None else spare
            seen = set(batch.corpus[batch.slots[:, 0]].tolist())
            if any(counts[kind] < self.batches for kind in seen):
                kept.append(_only_rows_with_images(copy.deepcopy(batch)))  # out of memory shared with loader processes
                counts.update(seen)
            if all(counts[kind] >= self.batches for kind in wanted):
                break
        if sum(len(batch.images) for batch in kept) < 2:
            kept = []  # a single image has no other place to go to
        most = int(gather(trainer, [len(kept)]).max())
        if most == 0 or spare is None:
            return None
        config = pl_module.config.vision
        fillers = [_without_targets(spare, config.image_size)] * (most - len(kept))
        itself = [[(b, 0)] for b in range(len(kept), most)]
        return Gauged([*kept, *fillers], [*elsewhere(kept), *itself], config.mean)


@dataclass(frozen=True)
class Gauged:
    """Held-out rows, and what takes their images' places."""

    batches: Sequence[KosmosBatch]
    others: Sequence[Sequence[tuple[int, int]]]
    """For each image of each batch: the batch and number of the image that stands in for it."""
    mean: Sequence[float]
    """(3,) colour of a blank image, in [0, 1]."""

    def sides(self) -> Iterator[Iterator[KosmosBatch]]:
        """Yield the batches with their images, with each other's, and with blank ones."""
        yield iter(self.batches)
        yield (self._with_others(b) for b in range(len(self.batches)))
        yield (self._blank(batch) for batch in self.batches)

    def _with_others(self, b: int) -> KosmosBatch:
        found = [self.batches[other].images[i] for other, i in self.others[b]]
        return replace(self.batches[b], images=torch.stack(found))

    def _blank(self, batch: KosmosBatch) -> KosmosBatch:
        colour = (255 * torch.tensor(self.mean)).round().to(torch.uint8)
        return replace(batch, images=colour.view(1, 3, 1, 1).expand_as(batch.images).contiguous())


def elsewhere(batches: Sequence[KosmosBatch], seed: int = 0) -> list[list[tuple[int, int]]]:
    """Return for each image of each batch another one, as its batch and number; each stands in for one.

    Images go round in one circle, so that none stays: those of a corpus behind each other in a drawn order, and only at
    its end one to the next corpus.
    """
    draw = torch.Generator().manual_seed(seed)
    places = [(b, i) for b, batch in enumerate(batches) for i in range(len(batch.images))]
    kinds = [kind for batch in batches for kind in batch.corpus[batch.slots[:, 0]].tolist()]
    drawn = torch.randperm(len(places), generator=draw).tolist()
    circle = [places[n] for n in sorted(drawn, key=kinds.__getitem__)]
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [[following[b, i] for i in range(len(batch.images))] for b, batch in enumerate(batches)]


def _only_rows_with_images(batch: KosmosBatch) -> KosmosBatch:
    """Leave the other rows' tokens out of the loss: no image changes them."""
    rows = batch.loss_at // batch.tokens.shape[1]
    return replace(batch, loss_at=batch.loss_at[torch.isin(rows, batch.slots[:, 0])])


def _without_targets(batch: KosmosBatch, side: int) -> KosmosBatch:
    """Return a batch that counts nothing and has one image: every rank takes part in whatever the others do."""
    return replace(
        batch,
        loss_at=batch.loss_at[:0],
        images=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        slots=torch.zeros(1, 2, dtype=torch.int64),
    )


def _losses(trainer: L.Trainer, pl_module: KosmosLit, batches: Iterator[KosmosBatch]) -> Losses:
    """Return the loss of each corpus over all ranks, by the run's own validation step: in its precision, sharded or not."""
    pl_module.val_loss.reset()
    for number, batch in enumerate(batches):
        trainer.strategy.validation_step(batch.to(pl_module.device), number)
    found = pl_module.val_loss.compute()
    return {corpus: float(found[key]) for corpus in CORPORA if (key := f"loss/{corpus}") in found}


def _differences(true: Losses, shuffled: Losses, blank: Losses) -> dict[str, Losses]:
    """Return what is logged of each corpus."""
    return {
        corpus: {
            "true": loss, "shuffled": shuffled[corpus], "blank": blank[corpus],
            "gain_shuffled": shuffled[corpus] - loss, "gain_blank": blank[corpus] - loss,
        }
        for corpus, loss in true.items()
    }  # fmt: skip


def _log(trainer: L.Trainer, pl_module: KosmosLit, found: dict[str, Losses]) -> None:
    figures = {f"val/visual_use/{corpus}/{name}": value for corpus, each in found.items() for name, value in each.items()}
    log_aside(trainer, pl_module, figures)
    if (bar := trainer.progress_bar_callback) is not None:
        gains = [f"{c} {e['gain_shuffled']:+.3f} ({e['gain_blank']:+.3f} blank)" for c, e in found.items()]
        bar.print(f"step {trainer.global_step:,} visual use, nats a token  {', '.join(gains)}")
