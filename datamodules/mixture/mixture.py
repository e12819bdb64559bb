"""Which source row i comes from: ratios to a schedule, exact at every prefix.

Rows are equally long, so a ratio in tokens is a ratio in rows. How rows are dealt out, and why every option is less than
one row from its share after every row, also where the ratio changes on the way, is told and proven in `dealing`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from datamodules.mixture.apportion import Piece, Target, deal
from kosmos_lit.errors import UserError

MAX_PERIOD = 100_000
"""Weights whose least common period is longer are rounded to this many parts: shares are then exact to 1e-5."""
MAX_COMMON = MAX_PERIOD**8
"""Stages whose least common period is longer are all rounded to MAX_PERIOD parts, to keep whole numbers small."""
BLOCK = 256
"""Rows of a pattern between two places with known counts."""

Weight = float | Fraction


@dataclass(frozen=True)
class Stage:
    """From `first_row` on, rows are dealt out by `weights`: one per option; only their proportion counts."""

    first_row: int
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        check_weights(f"from row {self.first_row} on", self.weights)


def check_weights(where: str, weights: Sequence[Weight], advice: str = "") -> None:
    """Raise UserError unless all weights are finite, none is negative and one is positive; `advice` is for the last."""
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise UserError(f"{where}: weights must be finite and not negative, got {_plain(weights)}")
    if not any(weights):
        raise UserError(f"{where}: at least one weight must be positive, got {_plain(weights)}{advice}")


class Mixture:
    """An endless sequence of option numbers, with random access, by weights that change from stage to stage.

    After every row, each option has had less than one row more or less than `target`. An option whose weight becomes 0 may
    get one row more, which it is behind by at that point.
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
        if math.lcm(*map(sum, parts)) > MAX_COMMON:
            parts = [to_parts(s.weights, exactly=True) for s in stages]
        changes = [n for n in range(len(stages)) if n == 0 or parts[n] != parts[n - 1]]
        self.n_options = len(parts[0])
        self.first_rows = [stages[n].first_row for n in changes]
        self.parts = [parts[n] for n in changes]
        """(stages, options) whole numbers: the weights that rows are dealt by."""
        self._patterns = [_Pattern(piece, self.n_options) for piece in deal(Target(self.first_rows, self.parts))]
        self._starts = [p.first_row for p in self._patterns]

    @classmethod
    def constant(cls, weights: Sequence[Weight]) -> Mixture:
        """Return the mixture of one stage."""
        return cls([Stage(0, tuple(weights))])

    def locate(self, row: int) -> tuple[int, int]:
        """Return the option of row `row`, and its number among that option's rows."""
        return self._patterns[bisect_right(self._starts, row) - 1].locate(row)

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows go to each option."""
        return self._patterns[bisect_right(self._starts, n_rows) - 1].counts(n_rows)

    def target(self, n_rows: int) -> list[Fraction]:
        """Return how many of the first `n_rows` rows would go to each option if rows could be split."""
        total = [Fraction(0)] * self.n_options
        for first, end, parts in zip(self.first_rows, [*self.first_rows[1:], n_rows], self.parts, strict=True):
            rows = min(end, n_rows) - first
            if rows > 0:
                total = [t + Fraction(rows * w, sum(parts)) for t, w in zip(total, parts, strict=True)]
        return total

    def row_of(self, option: int, number: int) -> int | None:
        """Return the row that is the option's `number`-th (from 0), or None if it has no such row."""
        at = bisect_right(self._patterns, number, key=lambda p: p.before[option]) - 1
        return self._patterns[at].row_of(option, number)


class _Pattern:
    """Rows that repeat from `first_row` on."""

    def __init__(self, piece: Piece, n_options: int) -> None:
        self.first_row, self.before = piece.first_row, piece.given
        self.options = np.array(piece.options, dtype=np.min_scalar_type(n_options))
        self.period = len(self.options)
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
        return [b + rounds * w + r for b, w, r in zip(self.before, self.marks[-1].tolist(), in_round, strict=True)]

    def row_of(self, option: int, number: int) -> int | None:
        per_round = int(self.marks[-1, option])
        if not per_round:
            return None
        rounds, nth = divmod(number - self.before[option], per_round)
        block = int(np.searchsorted(self.marks[:, option], nth, side="right")) - 1
        places = np.flatnonzero(self.options[block * BLOCK : (block + 1) * BLOCK] == option)
        at = block * BLOCK + int(places[nth - int(self.marks[block, option])])
        return self.first_row + rounds * self.period + at


def check_order(rows: Sequence[int]) -> None:
    """Raise UserError if the first rows of stages do not begin at row 0, or do not follow one another."""
    if not rows or rows[0] != 0:
        raise UserError(f"the first stage of a mixture must begin at row 0, got stages that begin at {rows}")
    for n in range(1, len(rows)):
        if rows[n] <= rows[n - 1]:
            raise UserError(
                f"stage {n} of a mixture must begin after row {rows[n - 1]}, where stage {n - 1} does, got {rows[n]}"
            )


def to_parts(weights: Sequence[Weight], *, exactly: bool = False) -> list[int]:
    """Return the smallest whole numbers in the proportion of the weights.

    If they add up to more than MAX_PERIOD, or `exactly` that many are wanted, they are rounded by largest remainder.

    Raises: UserError if a weight that is not 0 would be rounded to 0.
    """
    fractions = [exact(w) for w in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    whole = [int(f * scale) for f in fractions]
    shared = math.gcd(*whole)
    whole = [w // shared for w in whole]
    if sum(whole) <= MAX_PERIOD and not exactly:
        return whole
    parts = [Fraction(w * MAX_PERIOD, sum(whole)) for w in whole]
    rounded = [int(p) for p in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: rounded[k] - parts[k])
    for k in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[k] += 1
    if lost := [weights[k] for k in range(len(parts)) if whole[k] and not rounded[k]]:
        raise UserError(
            f"weight {_plain(lost)} is less than 1 part in {MAX_PERIOD} of {_plain(weights)}; raise it, or set it to 0"
        )
    return rounded


def exact(weight: Weight) -> Fraction:
    """Return a weight as it is written: 0.1 is a tenth."""
    return weight if isinstance(weight, Fraction) else Fraction(str(float(weight)))


def _plain(weights: Sequence[Weight]) -> str:
    return f"[{', '.join(f'{float(w):g}' if isinstance(w, Fraction) else str(w) for w in weights)}]"


# ---- two levels


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
        self._place = [self._sources[kind].index(s) for s, kind in enumerate(kind_of)]
        for n, stage in enumerate(stages):
            if (len(stage.ratio), len(stage.weights)) != (n_kinds, len(kind_of)):
                raise UserError(
                    f"stage {n} of a blend needs {n_kinds} shares of kinds and {len(kind_of)} weights of sources, "
                    f"got {len(stage.ratio)} and {len(stage.weights)}"
                )
        self.kinds = Mixture([Stage(stage.first_row, stage.ratio) for stage in stages])
        self._within = [self._within_kind(kind) for kind in range(n_kinds)]

    def _within_kind(self, kind: int) -> Mixture | None:
        """Return the mixture of a kind's sources over the kind's own rows; None for a kind without rows."""
        found: dict[int, Stage] = {}
        for stage in self.stages:
            if stage.ratio[kind]:
                weights = tuple(stage.weights[s] for s in self._sources[kind])
                check_weights(f"from row {stage.first_row} on, sources of kind {kind}", weights)
                first = self.kinds.counts(stage.first_row)[kind] if found else 0
                found[first] = Stage(first, weights)  # of stages without a row in between, the later one counts
        return Mixture(list(found.values())) if found else None

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of row `row`, and its number among that source's rows."""
        kind, number = self.kinds.locate(row)
        place, number = self._of(kind).locate(number)
        return self._sources[kind][place], number

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        found = [0] * len(self.kind_of)
        for kind, n_kind_rows in enumerate(self.kinds.counts(n_rows)):
            if n_kind_rows:
                for source, count in zip(self._sources[kind], self._of(kind).counts(n_kind_rows), strict=True):
                    found[source] = count
        return found

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


# ---- a change that nobody saw coming


class MixtureSchedule:
    """Blends of the same sources one after another: a run that goes on with other ratios or weights than it began with.

    A `Blend` knows its stages in advance, and the rows before a border depend on what follows it. Rows that a run has
    read already cannot: they stay as the blend of that time dealt them, and the next blend begins anew, its first row
    being the row of the change. So the bounds of a `Blend` hold for each leg, counted from the leg's first row.
    """

    def __init__(self, phases: Sequence[tuple[int, SourceMixture]]) -> None:
        """Take each leg's first row, in order from row 0, and its blend; a source that it does not read has weight 0 there.

        Raises: UserError if the legs are not in order.
        """
        check_order([row for row, _ in phases])
        self.first_rows, self.blends = [row for row, _ in phases], [blend for _, blend in phases]
        self._before = [[0] * len(self.blends[0].kind_of)]
        for n, first in enumerate(self.first_rows[1:]):
            self._before.append(self._after(n, first - self.first_rows[n]))

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of row `row`, and its number among that source's rows."""
        leg = self._leg(row)
        source, number = self.blends[leg].locate(row - self.first_rows[leg])
        return source, self._before[leg][source] + number

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        leg = self._leg(n_rows)
        return self._after(leg, n_rows - self.first_rows[leg])

    def row_of(self, source: int, number: int) -> int | None:
        """Return the row that is the source's `number`-th (from 0), or None if it has no such row."""
        leg = bisect_right(self._before, number, key=lambda before: before[source]) - 1
        row = self.blends[leg].row_of(source, number - self._before[leg][source])
        return None if row is None else self.first_rows[leg] + row

    def _leg(self, row: int) -> int:
        return bisect_right(self.first_rows, row) - 1

    def _after(self, leg: int, n_rows: int) -> list[int]:
        """Return the rows of each source before the `n_rows`-th of a leg."""
        return [b + c for b, c in zip(self._before[leg], self.blends[leg].counts(n_rows), strict=True)]
