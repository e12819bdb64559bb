"""How much a run will read of each source, before it reads anything.

Where the corpora are prepared, amounts are exact, from the row plans and the schedule. Where they are not, they are those of
typical documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.config import Unit
from datamodules.mixture.schedule import MixtureSchedule, Phase, build_schedule
from datamodules.mixture.shares import NamedSource, row_shares
from datamodules.mixture.steps import Steps
from datamodules.packing.row_plan import Amounts, Totals
from datamodules.prepared_source import PreparedSource
from kosmos_lit.batch import CORPORA

SAMPLED_ROWS = 4096
"""Rows of the stream that are searched for the largest micro-batch: more than a cycle of most mixtures."""
N_DEVIATIONS = 2.0
"""Standard deviations above the mean that the rows of the largest micro-batch are taken to have."""


@dataclass(frozen=True)
class SourceForecast:
    """What a run reads of one source."""

    name: str
    kind: int
    """Index into CORPORA."""
    amounts: Amounts
    epochs: float | None
    """Times that the source is read; None if it is not prepared."""
    document_length: float
    """Positions of the document that a position is in, on average."""


def forecast(
    sources: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, n_rows: int
) -> list[SourceForecast]:
    """Return what the first `n_rows` rows hold of each source."""
    forecasts = []
    for (name, kind), rows in zip(kinds.items(), schedule.counts(n_rows), strict=True):
        plan = sources[name].train.plan
        length = plan.row_sizes().document_length
        forecasts.append(SourceForecast(name, kind, plan.amounts(rows), rows / plan.n_rows, length))
    return forecasts


def last_step(
    sources: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, steps: Steps
) -> tuple[int, str] | None:
    """Return the last whole step before a source has been read `max_epochs` times, and the reason; None without a limit."""
    ends = []
    for index, name in enumerate(kinds):
        if name in sources and (limit := sources[name].config.max_epochs) is not None:
            # The source's first row beyond the limit, as its rows count from 0; a run may never read it.
            row = schedule.row_of(index, math.floor(limit * sources[name].train.plan.n_rows))
            reason = f"source {name} would be read more than {limit:g} times (max_epochs)"
            ends += [] if row is None else [(steps.step(row), reason)]
    # The earliest step, as it comes first in each pair.
    return min(ends, default=None)


def largest_micro_batch(
    sources: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, micro_batch_rows: int
) -> tuple[int, int]:
    """Return about how many images and supervised tokens a micro-batch holds at most."""
    sizes = {index: sources[name].train.plan.row_sizes() for index, name in enumerate(kinds) if name in sources}
    images = largest_amount({index: s.images for index, s in sizes.items()}, schedule, micro_batch_rows)
    return images, largest_amount({index: s.targets for index, s in sizes.items()}, schedule, micro_batch_rows)


def largest_amount(row_amounts: Mapping[int, tuple[float, float]], schedule: MixtureSchedule, micro_batch_rows: int) -> int:
    """Return about how much of something (images, say) a micro-batch holds at most.

    Args:
        row_amounts: mean and standard deviation of a row's amount, by the source's index in the schedule.
        schedule: the order of sources, which decides what rows share a micro-batch.
        micro_batch_rows: rows of a micro-batch, neighbours in the stream.
    """
    n = -(-max(SAMPLED_ROWS, micro_batch_rows) // micro_batch_rows) * micro_batch_rows  # whole micro-batches
    # (micro-batches, rows of each, mean and deviation)
    by_row = np.array([row_amounts[schedule.locate(row)[0]] for row in range(n)]).reshape(-1, micro_batch_rows, 2)
    # Rows vary independently, so that their variances add up.
    means, deviations = by_row[..., 0].sum(axis=1), np.sqrt((by_row[..., 1] ** 2).sum(axis=1))
    return math.ceil(float((means + N_DEVIATIONS * deviations).max()))


# ---- where there is no data yet


@dataclass(frozen=True)
class TypicalDocument:
    """The usual size of a document of one kind, used where the corpora are not prepared."""

    tokens: int
    """Text tokens and </s>, and one for each image."""
    images: int
    supervised_share: float = 1.0
    """Share of the text that is supervised."""


TYPICAL_DOCUMENTS = {
    "caption": TypicalDocument(19, 1),  # LAION's captions have 17 tokens in the median: 84 positions with 64 latents
    "interleaved": TypicalDocument(260, 2),  # a page of 390 positions with two images of 64 latents
    "instruct": TypicalDocument(260, 1, 0.5),
}
"""By kind; text, whose rows are full of text alone, needs none."""
EPOCH_ROWS = 1000
"""Rows of an epoch of a source that is not prepared: any number gives the same shares."""


def typical_epoch(kind: int, seq_len: int, n_latents: int) -> tuple[Amounts, float]:
    """Return what `EPOCH_ROWS` full rows of typical documents hold, and the positions of a document."""
    T = seq_len
    if (document := TYPICAL_DOCUMENTS.get(CORPORA[kind])) is None:
        return Amounts(EPOCH_ROWS, EPOCH_ROWS * T, EPOCH_ROWS * T, 0), float(T)
    # An image takes L + 2 positions, of which its marker among the tokens is one.
    positions = document.tokens + (n_latents + 1) * document.images
    # Documents that fill EPOCH_ROWS rows.
    n = EPOCH_ROWS * T / positions
    # Images are no targets.
    targets = round(n * (document.tokens - document.images) * document.supervised_share)
    return Amounts(EPOCH_ROWS, EPOCH_ROWS * T, targets, round(n * document.images)), float(min(T, positions))


@dataclass(frozen=True)
class TypicalForecast:
    """What a run reads if its rows are full of typical documents: the forecast where the corpora are not prepared."""

    kinds: Mapping[str, int]
    schedule: MixtureSchedule
    epochs: Mapping[str, tuple[Amounts, float]]
    """Of each source, as `typical_epoch` returns them."""

    @classmethod
    def of(
        cls,
        sources: Mapping[str, NamedSource],
        ratios: Sequence[tuple[int, Sequence[float]]],
        unit: Unit,
        steps: Steps,
        seq_len: int,
        n_latents: int,
    ) -> TypicalForecast:
        """Build the schedule by the same rules as with the corpora."""
        kinds = {name: source.kind for name, source in sources.items()}
        epochs = {name: typical_epoch(kind, seq_len, n_latents) for name, kind in kinds.items()}
        totals = {
            name: Totals(
                # Of these fields, `row_shares` reads rows, begun and targets.
                documents=EPOCH_ROWS,
                begun=max(1, round(a.positions / length)),
                rows=EPOCH_ROWS,
                positions=a.positions,
                targets=a.targets,
                images=a.images,
                dropped={},
                first_dropped={},
            )
            for name, (a, length) in epochs.items()
        }
        named = list(sources.values())
        stages = tuple(row_shares(steps.row(step), ratio, named, totals, unit) for step, ratio in ratios)
        return cls(kinds, build_schedule([Phase(0, stages)], kinds), epochs)

    def forecast(self, n_rows: int) -> list[SourceForecast]:
        """Return what the first `n_rows` rows hold of each source; `epochs` is None."""
        forecasts = []
        for (name, kind), rows in zip(self.kinds.items(), self.schedule.counts(n_rows), strict=True):
            a, length = self.epochs[name]
            positions, targets, images = (round(n * rows / EPOCH_ROWS) for n in (a.positions, a.targets, a.images))
            forecasts.append(SourceForecast(name, kind, Amounts(rows, positions, targets, images), None, length))
        return forecasts

    def largest_micro_batch(self, micro_batch_rows: int) -> tuple[int, int]:
        """Return about how many images and supervised tokens a micro-batch holds at most."""
        epochs = {index: self.epochs[name][0] for index, name in enumerate(self.kinds)}
        # No deviation: typical documents are all alike.
        images = {index: (a.images / EPOCH_ROWS, 0.0) for index, a in epochs.items()}
        targets = {index: (a.targets / EPOCH_ROWS, 0.0) for index, a in epochs.items()}
        return (
            largest_amount(images, self.schedule, micro_batch_rows),
            largest_amount(targets, self.schedule, micro_batch_rows),
        )
