"""Phases of a run one after another: each with shares that were known when it began, and one schedule of all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from datamodules.mixture.mixture import SourceMixture, SourceMixtureStage, check_order
from datamodules.mixture.shares import Shares
from kosmos_lit.batch import CORPORA

_NONE = Fraction()


@dataclass(frozen=True)
class Phase:
    """Stages of shares that were all known at the phase's first row; an unforeseen change begins another phase."""

    first_row: int
    stages: tuple[Shares, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"first_row": self.first_row, "stages": [s.to_dict() for s in self.stages]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Undo `to_dict`."""
        return cls(data["first_row"], tuple(Shares.from_dict(s) for s in data["stages"]))

    def starting_at(self, row: int) -> Phase:
        """Return the phase as if it began at a later row: the shares in force there, and those to come."""
        past = [s for s in self.stages if s.first_row <= row]  # never empty: a phase has a stage at its first row
        return Phase(row, (replace(past[-1], first_row=row), *(s for s in self.stages if s.first_row > row)))


def extend_phases(phases: Sequence[Phase], configured: Phase, row: int) -> list[Phase]:
    """Return the phases of a run that read up to `row` by `phases` and goes on as `configured`."""
    new = configured.starting_at(row)
    # Unchanged shares begin no phase: the rows stay those of a run that was not interrupted.
    if new == phases[-1].starting_at(row):
        return list(phases)
    # A phase that begins at `row` has no rows yet, and is replaced.
    return [*(phase for phase in phases if phase.first_row < row), new]


class MixtureSchedule:
    """Mixtures of the same sources one after another: a run that goes on with other ratios or weights than it began with.

    A `SourceMixture` knows its stages in advance, and the rows before a border depend on the stage behind it. Rows that a
    run has read already cannot: they stay as the mixture of that time had them, and the next mixture begins anew at the
    row of the change. So the bounds of a `SourceMixture` hold for each phase, counted from the phase's first row.
    """

    def __init__(self, phases: Sequence[tuple[int, SourceMixture]]) -> None:
        """Take each phase's first row, ascending from 0, and its mixture; a source that it does not read has weight 0.

        Raises: UserError if the phases are not in order.
        """
        check_order([row for row, _ in phases])
        self.first_rows, self.mixtures = [row for row, _ in phases], [mixture for _, mixture in phases]
        # (phases, sources): rows of each source before each phase.
        self._before = [[0] * len(self.mixtures[0].kind_of)]
        for n, first in enumerate(self.first_rows[1:]):
            self._before.append(self._counts_in(n, first - self.first_rows[n]))

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of row `row`, and its number among that source's rows."""
        phase = self._phase(row)
        source, number = self.mixtures[phase].locate(row - self.first_rows[phase])
        return source, self._before[phase][source] + number

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        phase = self._phase(n_rows)
        return self._counts_in(phase, n_rows - self.first_rows[phase])

    def row_of(self, source: int, number: int) -> int | None:
        """Return the row that is the source's `number`-th (from 0), or None if it has no such row."""
        # The last phase before which the source had no more than `number` rows.
        phase = bisect_right(self._before, number, key=lambda before: before[source]) - 1
        row = self.mixtures[phase].row_of(source, number - self._before[phase][source])
        return None if row is None else self.first_rows[phase] + row

    def _phase(self, row: int) -> int:
        return bisect_right(self.first_rows, row) - 1

    def _counts_in(self, phase: int, n_rows: int) -> list[int]:
        """Return the rows of each source before the `n_rows`-th row of a phase."""
        return [b + c for b, c in zip(self._before[phase], self.mixtures[phase].counts(n_rows), strict=True)]


def build_schedule(phases: Sequence[Phase], kinds: Mapping[str, int]) -> MixtureSchedule:
    """Return the schedule of all sources, in the order of `kinds`, which has the kind of each."""

    def mixture(phase: Phase) -> SourceMixture:
        stages = [
            # Rows from the phase's first one on; a source that the phase does not name has weight 0.
            SourceMixtureStage(s.first_row - phase.first_row, s.ratio, tuple(s.weights.get(name, _NONE) for name in kinds))
            for s in phase.stages
        ]
        return SourceMixture(list(kinds.values()), stages, len(CORPORA))

    return MixtureSchedule([(phase.first_row, mixture(phase)) for phase in phases])
