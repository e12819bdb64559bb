"""Rows dealt out to options by shares that may change at given rows, never a row away from what they add up to.

The problem is Tijdeman's chairman assignment (Discrete Mathematics 32, 1980, 323-330), with shares that vary in time.
T_i(n) is the sum of option i's shares over the first n rows, and d = 1 / (2k - 2) for k options (k > 1). Option i's m-th
turn (from 1) becomes due at the first row with T_i >= m - 1 + d, and its deadline is where T_i exceeds m - d. Each row
goes to the turn that is due with the nearest deadline. Then every option is within 1 - d of its T_i after every row:

1. A turn is always due. The T_i add up to n, and n - 1 rows are given, so before row n is given the options lag by 1
   together; if none lagged by d it would be less than k d <= 1.
2. No option is more than 1 - d ahead: it lagged by d or more when it got its row.
3. None is more than 1 - d behind. Suppose a turn misses its deadline at row N, the first to do so. Let M < N be the last row
   that went to a turn with a deadline later than N, or 0. Rows M + 1 to N went to turns that became due after M (else row M
   had been theirs) with deadlines up to N, and so would one more. Those of option i are whole numbers m with
   T_i(M) + 1 - d < m < T_i(N) + d, less than T_i(N) - T_i(M) + 2 d of them; the option of row M has none. Over the k - 1
   others that is less than N - M + 1: too few. From M = 0, m > 0 leaves less than T_i(N) + d, again less than N + 1.

Borders between shares need nothing of their own: due rows and deadlines are read off T, which is known in advance.

Where the shares stand still with period P, two dealings with different turns open agree once the open turns' deadlines
are past: their difference never gains a later deadline than its latest. So a stage soon repeats itself every P rows,
until turns are due whose deadlines lie beyond its end. That is found, not assumed: a stage is dealt until the turns given
have the same distance to T as one or more periods before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Piece:
    """Rows that repeat `options` from `first_row` on, until the next piece."""

    first_row: int
    given: tuple[int, ...]
    """Rows that each option had before."""
    options: list[int]


class Target:
    """What each option should have had after every row: T of this module, in whole numbers over one denominator."""

    def __init__(self, borders: Sequence[int], parts: Sequence[Sequence[int]]) -> None:
        """Take the first row of each stage, and there each option's whole number of parts."""
        self.borders, self.parts = borders, parts
        k = sum(any(column) for column in zip(*parts, strict=True))
        periods = [sum(stage) for stage in parts]
        self.d = math.lcm(*periods)
        self.unit = self.d * max(2, 2 * k - 2)
        """One row, so that d is whole too."""
        self.step = [[w * self.unit // p for w in stage] for stage, p in zip(parts, periods, strict=True)]
        """(stages, options): growth with each row."""
        self.base = [[0] * len(parts[0])]
        """(stages, options): at the first row of the stage."""
        for n, first in enumerate(borders[1:]):
            self.base.append([b + s * (first - borders[n]) for b, s in zip(self.base[n], self.step[n], strict=True)])
        self.fine = max(max(stage) for stage in self.step) ** 2
        """Deadlines are fractions over one of the steps: in parts of this size, different ones stay different."""

    def due(self, option: int, turn: int, stage: int = 0) -> tuple[float, int]:
        """Return the row at which a turn (from 1) becomes due, or infinity, and its stage; looks from `stage` on."""
        wanted = (turn - 1) * self.unit + self.d
        while stage + 1 < len(self.base) and self.base[stage + 1][option] < wanted:
            stage += 1
        step = self.step[stage][option]
        if not step:
            return math.inf, stage
        return self.borders[stage] - (self.base[stage][option] - wanted) // step - 1, stage

    def deadline(self, option: int, turn: int, stage: int = 0) -> tuple[float, int]:
        """Return where a turn (from 1) is overdue, in parts of `fine` of a row, or infinity, and its stage."""
        most = turn * self.unit - self.d
        while stage + 1 < len(self.base) and self.base[stage + 1][option] <= most:
            stage += 1
        step = self.step[stage][option]
        if not step:
            return math.inf, stage
        return self.borders[stage] * self.fine + (most - self.base[stage][option]) * self.fine // step, stage

    def looks_beyond(self, stage: int) -> float:
        """Return the first row at which a turn is due that has its deadline after this stage, at most the stage's end."""
        if stage + 1 == len(self.borders):
            return math.inf
        ends = self.base[stage + 1]
        first_turns = [(i, -(-(ends[i] + self.d) // self.unit)) for i, step in enumerate(self.step[stage]) if step]
        return min(self.borders[stage + 1], *(self.due(i, turn)[0] for i, turn in first_turns))


class Apportioner:
    """Deals row after row."""

    def __init__(self, target: Target) -> None:
        self.target, self.row = target, 0
        self.given = [0] * len(target.parts[0])
        self._look()

    def _look(self) -> None:
        """Find each option's next turn; all wait, and are sorted out by the next row."""
        options = range(len(self.given))
        self._stages = [(0, 0) for _ in options]
        self._open: list[tuple[float, int]] = []
        self._waiting = [turn for i in options if (turn := self._next(i))[0] < math.inf]
        heapify(self._waiting)

    def _next(self, option: int) -> tuple[float, float, int]:
        turn, (of_due, of_deadline) = self.given[option] + 1, self._stages[option]
        due, of_due = self.target.due(option, turn, of_due)
        deadline, of_deadline = self.target.deadline(option, turn, of_deadline)
        self._stages[option] = of_due, of_deadline
        return due, deadline, option

    def deal(self, n_rows: int) -> list[int]:
        """Return the options of the next rows."""
        waiting, still_open, options = self._waiting, self._open, []
        for row in range(self.row, self.row + n_rows):
            while waiting and waiting[0][0] <= row:
                _, deadline, option = heappop(waiting)
                heappush(still_open, (deadline, option))
            _, option = heappop(still_open)
            options.append(option)
            self.given[option] += 1
            turn = self._next(option)
            if turn[0] < math.inf:
                heappush(waiting, turn)
        self.row += n_rows
        return options

    def skip(self, n_rows: int, given: Sequence[int]) -> None:
        """Go on `n_rows` later, when each option has had so many more."""
        self.row += n_rows
        self.given = [g + more for g, more in zip(self.given, given, strict=True)]
        self._look()


def deal(target: Target) -> list[Piece]:
    """Return the whole sequence; the last piece repeats for ever.

    Takes time and memory for some periods of each stage, however many rows it has.
    """
    dealer, pieces = Apportioner(target), []
    for stage, first in enumerate(target.borders):
        parts = target.parts[stage]
        period = sum(parts)
        end = target.borders[stage + 1] if stage + 1 < len(target.borders) else math.inf
        beyond = target.looks_beyond(stage)
        given, options = tuple(dealer.given), list[int]()
        seen: dict[tuple[int, ...], int] = {}
        while dealer.row < end:
            done = len(options)
            ahead = tuple(g - done // period * w for g, w in zip(dealer.given, parts, strict=True))
            cycle = done - seen.setdefault(ahead, done)
            if not cycle or dealer.row + cycle > beyond:
                options += dealer.deal(int(min(period, end - dealer.row)))
                continue
            if done > cycle:
                pieces.append(Piece(first, given, options[:-cycle]))
            before = tuple(g - cycle // period * w for g, w in zip(dealer.given, parts, strict=True))
            pieces.append(Piece(dealer.row - cycle, before, options[-cycle:]))
            if math.isinf(beyond):
                return pieces
            rounds = int(beyond - dealer.row) // cycle
            dealer.skip(rounds * cycle, [rounds * cycle // period * w for w in parts])
            first, given, options, seen = dealer.row, tuple(dealer.given), [], {}
            beyond = first  # what is left is dealt row by row
        if options:
            pieces.append(Piece(first, given, options))
    raise AssertionError("the last stage ends nowhere")
