"""Which corpus row i comes from: ratios to a schedule, exact at every prefix.

Rows are equally long, so a ratio in tokens is a ratio in rows. The schedule is Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980): of the corpora that are due, take the one whose deadline is nearest.
After any number of rows each corpus is less than one row away from its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kosmos_lit.errors import UserError

MAX_PERIOD = 1_000_000
"""Ratios whose least common period is longer are rounded to this many parts."""


class Mixture:
    """An endless sequence of corpus numbers with period `period`, with random access."""

    def __init__(self, ratio: Sequence[float]) -> None:
        """Take one non-negative weight per corpus.

        Raises: UserError if a weight is negative or not finite, or all are zero.
        """
        for weight in ratio:
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"ratio: weights must be finite and not negative, got {list(ratio)}")
        if not sum(ratio):
            raise UserError(f"ratio: at least one weight must be positive, got {list(ratio)}")
        self.weights = _integers(ratio)
        self.period = sum(self.weights)

    @cached_property
    def _pattern(self) -> npt.NDArray[np.int8]:
        return np.array(chairmen(self.weights), dtype=np.int8)

    @cached_property
    def _before(self) -> npt.NDArray[np.int64]:
        """(period + 1, corpora): rows of each corpus before each place of the pattern."""
        counts = np.zeros((self.period + 1, len(self.weights)), dtype=np.int64)
        np.cumsum(self._pattern[:, None] == np.arange(len(self.weights)), axis=0, out=counts[1:])
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """Return the corpus of stream row `row`, and its number among that corpus's rows."""
        rounds, at = divmod(row, self.period)
        corpus = int(self._pattern[at])
        return corpus, rounds * self.weights[corpus] + int(self._before[at, corpus])

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each corpus."""
        rounds, at = divmod(n_rows, self.period)
        return [rounds * w + int(b) for w, b in zip(self.weights, self._before[at], strict=True)]


def chairmen(weights: Sequence[int]) -> list[int]:
    """Return one period of the schedule: sum(weights) corpus numbers, each as often as its weight."""
    period = sum(weights)
    ours = [k for k, w in enumerate(weights) if w]
    if len(ours) == 1:
        return ours * period
    slack = 2 * len(ours) - 2
    given = dict.fromkeys(ours, 0)
    sequence = []
    for n in range(1, period + 1):
        # In units of 1 / period: how far each corpus lags if it does not get row n.
        lag = {k: weights[k] * n - given[k] * period for k in ours}
        due = [k for k in ours if lag[k] * slack >= period]
        chosen = min(due, key=lambda k: Fraction((slack - 1) * period - slack * lag[k], weights[k]))
        given[chosen] += 1
        sequence.append(chosen)
    return sequence


def _integers(ratio: Sequence[float]) -> list[int]:
    """Return the smallest integers in the given ratio; beyond MAX_PERIOD parts, rounded by largest remainder."""
    exact = [Fraction(str(float(w))) for w in ratio]
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    shared = math.gcd(*whole)
    whole = [w // shared for w in whole]
    if sum(whole) <= MAX_PERIOD:
        return whole
    parts = [Fraction(w * MAX_PERIOD, sum(whole)) for w in whole]
    rounded = [int(p) for p in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: rounded[k] - parts[k])
    for k in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[k] += 1
    return rounded
