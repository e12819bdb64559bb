"""Which option each row goes to by weights, exact at every prefix: `Mixture`, and `SourceMixture` of kinds and sources.

Rows are equally long, so a ratio in tokens is a ratio in rows. The algorithm, and the proof that every option is less than
one row from its share after every row, also where the ratio changes on the way, are in `apportion`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from datamodules.mixture.apportion import Cycle, IdealCounts, apportion
from datamodules.mixture.weights import MAX_PERIOD, Weight, check_weights, to_parts
from kosmos_lit.errors import UserError

MAX_COMMON_PERIOD = MAX_PERIOD**8
"""Stages whose least common period is longer are all rounded to MAX_PERIOD parts, to keep integers small."""
BLOCK = 256
"""Rows of a cycle between two places with stored counts."""


@dataclass(frozen=True)
class Stage:
    """From `first_row` on, rows are apportioned by `weights`: one per option; only their proportion counts."""

    first_row: int
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        check_weights(f"from row {self.first_row} on", self.weights)


def check_order(rows: Sequence[int]) -> None:
    """Raise UserError unless the first rows of stages begin at row 0 and ascend."""
    if not rows or rows[0] != 0:
        raise UserError(f"the first stage of a mixture must begin at row 0, got stages that begin at {rows}")
    for n in range(1, len(rows)):
        if rows[n] <= rows[n - 1]:
            raise UserError(
                f"stage {n} of a mixture must begin after row {rows[n - 1]}, where stage {n - 1} does, got {rows[n]}"
            )


class Mixture:
    """An endless sequence of option numbers, with random access, by weights that change from stage to stage.

    After every row, each option has had less than one row more or less than `ideal_counts`. An option whose weight becomes
    0 may get one row more, which it is behind by at that point.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Take the stages in order, the first from row 0.

        Takes time and memory for up to some MAX_PERIOD rows of each stage, however long it is.

        Raises: UserError if the stages are not in order or differ in options, or a weight is too small a share.
        """
        check_order([stage.first_row for stage in stages])
        if len(sizes := {len(s.weights) for s in stages}) != 1:
            raise UserError(f"every stage needs a weight for each option, got stages with {sorted(sizes)} weights")
        parts = [to_parts(s.weights) for s in stages]
        if math.lcm(*map(sum, parts)) > MAX_COMMON_PERIOD:
            parts = [to_parts(s.weights, round_always=True) for s in stages]
        # A stage with the parts of the one before it changes nothing: cycles run on.
        changes = [n for n in range(len(stages)) if n == 0 or parts[n] != parts[n - 1]]
        self.n_options = len(parts[0])
        self.first_rows = [stages[n].first_row for n in changes]
        self.parts = [parts[n] for n in changes]
        """(stages, options) integers: the weights that rows are apportioned by."""
        cycles = apportion(IdealCounts(self.first_rows, self.parts))
        self._cycles = [_IndexedCycle(cycle, self.n_options) for cycle in cycles]
        self._starts = [cycle.first_row for cycle in self._cycles]

    @classmethod
    def constant(cls, weights: Sequence[Weight]) -> Mixture:
        """Return the mixture of one stage."""
        return cls([Stage(0, tuple(weights))])

    def locate(self, row: int) -> tuple[int, int]:
        """Return the option of row `row`, and its number among that option's rows."""
        # The last cycle that begins at the row or before it.
        return self._cycles[bisect_right(self._starts, row) - 1].locate(row)

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows go to each option."""
        return self._cycles[bisect_right(self._starts, n_rows) - 1].counts(n_rows)

    def ideal_counts(self, n_rows: int) -> list[Fraction]:
        """Return how many of the first `n_rows` rows would go to each option if rows could be split."""
        total = [Fraction(0)] * self.n_options
        for first, end, parts in zip(self.first_rows, [*self.first_rows[1:], n_rows], self.parts, strict=True):
            rows = min(end, n_rows) - first
            if rows > 0:
                total = [t + Fraction(rows * w, sum(parts)) for t, w in zip(total, parts, strict=True)]
        return total

    def row_of(self, option: int, number: int) -> int | None:
        """Return the row that is the option's `number`-th (from 0), or None if it has no such row."""
        # Of cycles with equal counts before them, only the last has rows of the option.
        at = bisect_right(self._cycles, number, key=lambda cycle: cycle.before[option]) - 1
        return self._cycles[at].row_of(option, number)


class _IndexedCycle:
    """A cycle with random access: an array of options, and counts every BLOCK rows."""

    def __init__(self, cycle: Cycle, n_options: int) -> None:
        self.first_row, self.before = cycle.first_row, cycle.counts
        # One byte a row, for up to 255 options.
        self.options = np.array(cycle.options, dtype=np.min_scalar_type(n_options))
        self.period = len(self.options)
        # Counts at every BLOCK-th row: a lookup counts fewer than BLOCK rows itself.
        starts = np.arange(0, self.period, BLOCK)
        per_block = [np.bincount(self.options[s : s + BLOCK], minlength=n_options) for s in starts]
        self.marks: npt.NDArray[np.int32] = np.cumsum([np.zeros(n_options), *per_block], axis=0).astype(np.int32)
        """(blocks + 1, options): rows of each option before each block, and in all."""

    def locate(self, row: int) -> tuple[int, int]:
        rounds, at = divmod(row - self.first_row, self.period)
        option, block = int(self.options[at]), at // BLOCK
        in_block = int(np.count_nonzero(self.options[block * BLOCK : at] == option))
        in_round = int(self.marks[block, option]) + in_block
        return option, self.before[option] + rounds * int(self.marks[-1, option]) + in_round

    def counts(self, n_rows: int) -> list[int]:
        rounds, at = divmod(n_rows - self.first_row, self.period)
        block = at // BLOCK
        in_block = np.bincount(self.options[block * BLOCK : at], minlength=len(self.before))
        in_round = (self.marks[block] + in_block).tolist()
        # tolist: `marks` are int32, which the counts of a long stream overflow.
        return [b + rounds * w + r for b, w, r in zip(self.before, self.marks[-1].tolist(), in_round, strict=True)]

    def row_of(self, option: int, number: int) -> int | None:
        per_round = int(self.marks[-1, option])
        if not per_round:
            return None
        rounds, nth = divmod(number - self.before[option], per_round)
        # side="right": blocks without the option have the mark of the next one, and are passed over.
        block = int(np.searchsorted(self.marks[:, option], nth, side="right")) - 1
        places = np.flatnonzero(self.options[block * BLOCK : (block + 1) * BLOCK] == option)
        at = block * BLOCK + int(places[nth - int(self.marks[block, option])])
        return self.first_row + rounds * self.period + at


# ---- sources within kinds


@dataclass(frozen=True)
class SourceMixtureStage:
    """From `first_row` on: `ratio` has a weight per kind, `weights` one per source, which counts within its kind."""

    first_row: int
    ratio: tuple[Weight, ...]
    weights: tuple[Weight, ...]


class SourceMixture:
    """Rows to named sources: kinds by ratio, and within a kind its sources by weight.

    After every row, each kind is less than one row from its share of the rows, and each source less than one row from its
    share of its kind's rows. Both are a `Mixture`: over all rows, and over the rows of the kind.
    """

    def __init__(self, kind_of: Sequence[int], stages: Sequence[SourceMixtureStage], n_kinds: int) -> None:
        """Take each source's kind, and the stages in order, the first from row 0.

        Raises: UserError if a weight is impossible, or a kind with a share has no source with a weight.
        """
        check_order([stage.first_row for stage in stages])
        self.kind_of, self.n_kinds, self.stages = list(kind_of), n_kinds, list(stages)
        self._sources = [[s for s, k in enumerate(kind_of) if k == kind] for kind in range(n_kinds)]
        # Of each source, its option in the mixture of its kind.
        self._place = [self._sources[kind].index(s) for s, kind in enumerate(kind_of)]
        for n, stage in enumerate(stages):
            if (len(stage.ratio), len(stage.weights)) != (n_kinds, len(kind_of)):
                raise UserError(
                    f"stage {n} of a mixture needs {n_kinds} shares of kinds and {len(kind_of)} weights of sources, "
                    f"got {len(stage.ratio)} and {len(stage.weights)}"
                )
        self.kinds = Mixture([Stage(stage.first_row, stage.ratio) for stage in stages])
        self._within = [self._within_kind(kind) for kind in range(n_kinds)]

    def _within_kind(self, kind: int) -> Mixture | None:
        """Return the mixture of a kind's sources over the kind's own rows; None for a kind without rows."""
        within: dict[int, Stage] = {}
        for stage in self.stages:
            if stage.ratio[kind]:
                weights = tuple(stage.weights[s] for s in self._sources[kind])
                # Only in stages in which the kind has a share: in others all its weights may be 0.
                check_weights(f"from row {stage.first_row} on, sources of kind {kind}", weights)
                first = self.kinds.counts(stage.first_row)[kind] if within else 0
                within[first] = Stage(first, weights)  # of stages without a row in between, the later one counts
        return Mixture(list(within.values())) if within else None

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of row `row`, and its number among that source's rows."""
        kind, number = self.kinds.locate(row)
        place, number = self._of(kind).locate(number)
        return self._sources[kind][place], number

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        counts = [0] * len(self.kind_of)
        for kind, n_kind_rows in enumerate(self.kinds.counts(n_rows)):
            if n_kind_rows:
                for source, count in zip(self._sources[kind], self._of(kind).counts(n_kind_rows), strict=True):
                    counts[source] = count
        return counts

    def row_of(self, source: int, number: int) -> int | None:
        """Return the row that is the source's `number`-th (from 0), or None if it has no such row."""
        kind = self.kind_of[source]
        within = self._within[kind]
        among_kind = within.row_of(self._place[source], number) if within is not None else None
        return self.kinds.row_of(kind, among_kind) if among_kind is not None else None

    def _of(self, kind: int) -> Mixture:
        within = self._within[kind]
        assert within is not None, f"kind {kind} has rows but no sources"
        return within
