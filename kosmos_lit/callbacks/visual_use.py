"""The visual-use gauge: losses of the same held-out tokens with true, shuffled and blank images."""

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
from kosmos_lit.callbacks.isolation import isolated_evaluation, log_separate_row
from kosmos_lit.callbacks.ranks import gather_values
from kosmos_lit.errors import UserError
from kosmos_lit.lit import KosmosLit

TEXT = CORPORA.index("text")
Losses = dict[str, float]
"""Nats a token, by corpus."""


class ValidationData(Protocol):
    """The data module as the gauge reads it."""

    def val_dataloader(self) -> Any:
        """Return the held-out rows of this rank, the same number of batches on all ranks."""


class VisualUse(Callback):
    """Logs every N optimizer steps how much images lower the loss of held-out rows, in nats per token.

    Three losses of the same tokens, for each corpus with images: `val/visual_use/CORPUS/true` with their own images,
    `shuffled` with the images permuted, `blank` with uniform images of the tower's mean colour. `gain_shuffled` and
    `gain_blank` are the differences to `true`: near 0, the model ignores images. Any image can tell a model something
    (that it is a photograph, of a page's kind), which only `gain_blank` includes; `gain_shuffled` is the worth of the
    right image.

    The rows are read once and kept on the host. Losses and weights of the run are those of a run without a gauge.
    """

    def __init__(self, every_n_steps: int = 1000, batches: int = 4) -> None:
        """Set how often and on how many batches losses are measured.

        Args:
            every_n_steps: Optimizer steps from one measurement to the next; each is made at the next row of the log.
            batches: Micro-batches of each corpus on each rank; a measurement runs the model on them three times.

        Raises: UserError if one is not positive.
        """
        if every_n_steps <= 0 or batches <= 0:
            raise UserError(f"VisualUse: every_n_steps {every_n_steps} and batches {batches} must be positive")
        self.every_n_steps, self.batches = every_n_steps, batches
        self._step = self._measured_at = 0
        self._rows: ControlledBatches | None = None
        self._is_off = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        self._step = self._measured_at = trainer.global_step
        self._rows = None
        # Without validation, or without a corpus that has images, nothing can be measured.
        self._is_off = not trainer.limit_val_batches or not set(pl_module.kinds.values()) - {TEXT}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KosmosLit)
        step, before = trainer.global_step, self._step
        self._step = step
        # Due once a multiple of `every_n_steps` has passed, which need not fall on a row of the log.
        is_row = step != before and step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._is_off or not is_row or step // self.every_n_steps == self._measured_at // self.every_n_steps:
            return
        self._measured_at = step
        with isolated_evaluation(trainer, pl_module):
            # Read once: every measurement is of the same tokens.
            rows = self._rows = self._rows or self._collect(trainer, pl_module)
            # On all ranks or on none, as the counts were gathered.
            if rows is None:
                self._is_off = True
                rank_zero_info("VisualUse is off: no rank has two held-out images; raise a corpus's val_share")
                return
            losses = _with_gains(*(_losses(trainer, pl_module, batches) for batches in rows.controls()))
        _log(trainer, pl_module, losses)

    def _collect(self, trainer: L.Trainer, pl_module: KosmosLit) -> ControlledBatches | None:
        """Read the first batches with images of each corpus; ranks with fewer than others get empty ones.

        Returns: None if no rank has two images.
        """
        data: ValidationData = trainer.datamodule  # type: ignore[attr-defined]
        batches: list[KosmosBatch] = []
        counts: Counter[int] = Counter()
        image_kinds = set(pl_module.kinds.values()) - {TEXT}
        spare: KosmosBatch | None = None
        for batch in data.val_dataloader():
            # The base of fillers on a rank with too few batches.
            spare = batch if spare is None else spare
            # Corpora of the rows that have images.
            seen = set(batch.corpus[batch.slots[:, 0]].tolist())
            if any(counts[kind] < self.batches for kind in seen):
                # Copied, as the loader reuses memory that it shares with its processes.
                batches.append(_only_rows_with_images(copy.deepcopy(batch)))
                counts.update(seen)
            if all(counts[kind] >= self.batches for kind in image_kinds):
                break
        if sum(len(batch.images) for batch in batches) < 2:
            batches = []  # a single image cannot be shuffled
        # All ranks run the same number of batches, as a sharded model's forward is a collective.
        most = int(gather_values(trainer, [len(batches)]).max())
        if most == 0 or spare is None:
            return None
        config = pl_module.config.vision
        fillers = [_without_targets(spare, config.image_size)] * (most - len(batches))
        unmoved = [[(b, 0)] for b in range(len(batches), most)]  # a filler's image replaces itself
        return ControlledBatches([*batches, *fillers], [*shuffled_images(batches), *unmoved], config.mean)


@dataclass(frozen=True)
class ControlledBatches:
    """Held-out batches under the image controls."""

    batches: Sequence[KosmosBatch]
    replacements: Sequence[Sequence[tuple[int, int]]]
    """For each image of each batch: batch and index of the image that replaces it when shuffled."""
    mean: Sequence[float]
    """(3,) colour of a blank image, in [0, 1]."""

    def controls(self) -> Iterator[Iterator[KosmosBatch]]:
        """Yield the batches with true, shuffled and blank images."""
        yield iter(self.batches)
        yield (self._shuffled(b) for b in range(len(self.batches)))
        yield (self._blank(batch) for batch in self.batches)

    def _shuffled(self, b: int) -> KosmosBatch:
        images = [self.batches[other].images[i] for other, i in self.replacements[b]]
        return replace(self.batches[b], images=torch.stack(images))

    def _blank(self, batch: KosmosBatch) -> KosmosBatch:
        # The tower subtracts this colour, so a blank image is about zero.
        colour = (255 * torch.tensor(self.mean)).round().to(torch.uint8)
        return replace(batch, images=colour.view(1, 3, 1, 1).expand_as(batch.images).contiguous())


def shuffled_images(batches: Sequence[KosmosBatch], seed: int = 0) -> list[list[tuple[int, int]]]:
    """Return for each image of each batch its replacement, as batch and index: a permutation without fixed points.

    The permutation is one cycle, in random order within a corpus, so that only the last image of each corpus is replaced by
    one of another corpus.
    """
    # A fixed seed: a resumed run shuffles as the first one did.
    generator = torch.Generator().manual_seed(seed)
    places = [(b, i) for b, batch in enumerate(batches) for i in range(len(batch.images))]
    kinds = [kind for batch in batches for kind in batch.corpus[batch.slots[:, 0]].tolist()]
    order = torch.randperm(len(places), generator=generator).tolist()
    cycle = [places[n] for n in sorted(order, key=kinds.__getitem__)]  # stable: a random order within each kind
    # Each image takes its successor's, the last one the first's: none keeps its own.
    next_place = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [[next_place[b, i] for i in range(len(batch.images))] for b, batch in enumerate(batches)]


def _only_rows_with_images(batch: KosmosBatch) -> KosmosBatch:
    """Drop the tokens of rows without images from the loss."""
    rows = batch.loss_at // batch.tokens.shape[1]
    return replace(batch, loss_at=batch.loss_at[torch.isin(rows, batch.slots[:, 0])])


def _without_targets(batch: KosmosBatch, side: int) -> KosmosBatch:
    """Return a batch with one image and no loss, for ranks that have fewer batches than others."""
    return replace(
        batch,
        loss_at=batch.loss_at[:0],
        images=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        # Latents at the start of row 0 harm nothing without a loss.
        slots=torch.zeros(1, 2, dtype=torch.int64),
    )


def _losses(trainer: L.Trainer, pl_module: KosmosLit, batches: Iterator[KosmosBatch]) -> Losses:
    """Return the loss of each corpus over all ranks, by the run's own validation step and precision."""
    pl_module.val_loss.reset()
    for number, batch in enumerate(batches):
        trainer.strategy.validation_step(batch.to(pl_module.device), number)
    losses = pl_module.val_loss.compute()
    return {corpus: float(losses[key]) for corpus in CORPORA if (key := f"loss/{corpus}") in losses}


def _with_gains(true: Losses, shuffled: Losses, blank: Losses) -> dict[str, Losses]:
    """Return the three losses and two gains of each corpus."""
    return {
        corpus: {
            "true": loss,
            "shuffled": shuffled[corpus],
            "blank": blank[corpus],
            "gain_shuffled": shuffled[corpus] - loss,
            "gain_blank": blank[corpus] - loss,
        }
        for corpus, loss in true.items()
    }


def _log(trainer: L.Trainer, pl_module: KosmosLit, losses: dict[str, Losses]) -> None:
    metrics = {f"val/visual_use/{corpus}/{name}": value for corpus, each in losses.items() for name, value in each.items()}
    log_separate_row(trainer, pl_module, metrics)
    if (bar := trainer.progress_bar_callback) is not None:
        gains = [f"{c} {e['gain_shuffled']:+.3f} ({e['gain_blank']:+.3f} blank)" for c, e in losses.items()]
        bar.print(f"step {trainer.global_step:,} visual use, nats a token  {', '.join(gains)}")
