"""What a run is going to read, before it reads anything: exactly, from the plans and the schedule; from typical documents
where there are none yet.
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

LOOKED_AT = 4096
"""Rows of the stream among which the largest micro-batch is looked for: more than a round of most mixtures."""
SPREAD = 2.0
"""Standard deviations above the mean that the rows of the largest micro-batch are taken to be."""


@dataclass(frozen=True)
class SourceForecast:
    """What a run reads of one source."""

    name: str
    kind: int
    """Index into CORPORA."""
    amounts: Amounts
    epochs: float | None
    """How often it is read; None where it is not at hand."""
    document: float
    """Positions of the document that a position is in, on average."""


def forecast(
    opened: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, n_rows: int
) -> list[SourceForecast]:
    """Return what the first `n_rows` rows hold of each source."""
    found = []
    for (name, kind), rows in zip(kinds.items(), schedule.counts(n_rows), strict=True):
        plan = opened[name].train.plan
        found.append(SourceForecast(name, kind, plan.read(rows), rows / plan.n_rows, plan.row_sizes().document))
    return found


def last_step(
    opened: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, steps: Steps
) -> tuple[int, str] | None:
    """Return the last whole step before a source has been read `max_epochs` times, and why; None: none ever has."""
    ends = []
    for at, name in enumerate(kinds):
        if name in opened and (limit := opened[name].config.max_epochs) is not None:
            row = schedule.row_of(at, math.floor(limit * opened[name].train.plan.n_rows))
            why = f"source {name} would be read more than {limit:g} times (max_epochs)"
            ends += [] if row is None else [(steps.step(row), why)]
    return min(ends, default=None)


def largest(sizes: Mapping[int, tuple[float, float]], schedule: MixtureSchedule, micro_batch_rows: int) -> int:
    """Return how much a micro-batch holds at most, if rows vary as they do.

    Args:
        sizes: mean and standard deviation of a row's, by the source's place in the schedule.
        schedule: which rows are neighbours.
        micro_batch_rows: rows of a micro-batch, neighbours in the stream.
    """
    n = -(-max(LOOKED_AT, micro_batch_rows) // micro_batch_rows) * micro_batch_rows
    table = np.array([sizes[schedule.locate(row)[0]] for row in range(n)]).reshape(-1, micro_batch_rows, 2)
    means, deviations = table[..., 0].sum(axis=1), np.sqrt((table[..., 1] ** 2).sum(axis=1))
    return math.ceil(float((means + SPREAD * deviations).max()))


def largest_micro_batch(
    opened: Mapping[str, PreparedSource], kinds: Mapping[str, int], schedule: MixtureSchedule, micro_batch_rows: int
) -> tuple[int, int]:
    """Return about how many images and supervised tokens a micro-batch holds at most."""
    rows = {at: opened[name].train.plan.row_sizes() for at, name in enumerate(kinds) if name in opened}
    images = largest({at: r.images for at, r in rows.items()}, schedule, micro_batch_rows)
    return images, largest({at: r.targets for at, r in rows.items()}, schedule, micro_batch_rows)


# ---- where there is no data yet


@dataclass(frozen=True)
class Typical:
    """A document as it usually is, of a kind whose documents are not at hand."""

    tokens: int
    """Text tokens and </s>, and one for each image."""
    images: int
    learnt: float = 1.0
    """Share of the text that is supervised."""


TYPICAL = {
    "caption": Typical(19, 1),  # LAION's captions have 17 tokens in the median: 84 positions with 64 latents
    "interleaved": Typical(260, 2),  # a page of 390 positions with two images of 64 latents
    "instruct": Typical(260, 1, 0.5),
}
"""By kind; text, whose rows are full of text alone, needs none."""
ROWS = 1000
"""Rows of an epoch of a source that is not there: any number gives the same shares."""


def typical_row(kind: int, seq_len: int, n_latents: int) -> tuple[Amounts, float]:
    """Return what `ROWS` rows of a kind hold, and the positions of a document."""
    T = seq_len
    if (document := TYPICAL.get(CORPORA[kind])) is None:
        return Amounts(ROWS, ROWS * T, ROWS * T, 0), float(T)
    positions = document.tokens + (n_latents + 1) * document.images
    n = ROWS * T / positions
    targets = round(n * (document.tokens - document.images) * document.learnt)
    return Amounts(ROWS, ROWS * T, targets, round(n * document.images)), float(min(T, positions))


@dataclass(frozen=True)
class TypicalForecast:
    """A run's reading where the corpora are not at hand: full rows of typical documents."""

    kinds: Mapping[str, int]
    schedule: MixtureSchedule
    rows: Mapping[str, tuple[Amounts, float]]
    """Of each source, as `typical_row` gives them."""

    @classmethod
    def of(
        cls, sources: Mapping[str, NamedSource], ratios: Sequence[tuple[int, Sequence[float]]], unit: Unit, steps: Steps,
        seq_len: int, n_latents: int,
    ) -> TypicalForecast:  # fmt: skip
        """Deal rows out by the same rules as with the corpora."""
        kinds = {name: source.kind for name, source in sources.items()}
        rows = {name: typical_row(kind, seq_len, n_latents) for name, kind in kinds.items()}
        totals = {
            name: Totals(
                documents=ROWS, begun=max(1, round(a.positions / document)), rows=ROWS, positions=a.positions,
                targets=a.targets, images=a.images, dropped={}, first_dropped={},
            )
            for name, (a, document) in rows.items()
        }  # fmt: skip
        named = list(sources.values())
        stages = tuple(row_shares(steps.row(step), ratio, named, totals, unit) for step, ratio in ratios)
        return cls(kinds, build_schedule([Phase(0, stages)], kinds), rows)

    def forecast(self, n_rows: int) -> list[SourceForecast]:
        """Return what the first `n_rows` rows hold of each source; nothing is known of epochs."""
        found = []
        for (name, kind), rows in zip(self.kinds.items(), self.schedule.counts(n_rows), strict=True):
            a, document = self.rows[name]
            positions, targets, images = (round(n * rows / ROWS) for n in (a.positions, a.targets, a.images))
            found.append(SourceForecast(name, kind, Amounts(rows, positions, targets, images), None, document))
        return found

    def largest_micro_batch(self, micro_batch_rows: int) -> tuple[int, int]:
        """Return about how many images and supervised tokens a micro-batch holds at most."""
        rows = {at: self.rows[name][0] for at, name in enumerate(self.kinds)}
        images = largest({at: (a.images / ROWS, 0.0) for at, a in rows.items()}, self.schedule, micro_batch_rows)
        return images, largest({at: (a.targets / ROWS, 0.0) for at, a in rows.items()}, self.schedule, micro_batch_rows)
