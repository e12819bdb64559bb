"""A sequence of options by shares that may change at given rows, each option never a row away from its sum of shares.

The problem is Tijdeman's chairman assignment (Discrete Mathematics 32, 1980, 323-330), with shares that vary in time.
T_i(n) is the sum of option i's shares over the first n rows, and d = 1 / (2k - 2) for k options (k > 1). Option i's m-th
turn (from 1) becomes due at the first row with T_i >= m - 1 + d, and its deadline is where T_i exceeds m - d. Each row
goes to the turn that is due with the nearest deadline. Then every option is within 1 - d of its T_i after every row:

1. A turn is always due. The T_i add up to n, and n - 1 rows are assigned, so before row n is assigned the options lag by
   1 together; if none lagged by d it would be less than k d <= 1.
2. No option is more than 1 - d ahead: it lagged by d or more when it got its row.
3. None is more than 1 - d behind. Suppose a turn misses its deadline at row N, the first to do so. Let M < N be the last row
   that went to a turn with a deadline later than N, or 0. Rows M + 1 to N went to turns that became due after M (else they
   would have had row M) with deadlines up to N, and so would one more. Those of option i are integers m with
   T_i(M) + 1 - d < m < T_i(N) + d, less than T_i(N) - T_i(M) + 2 d of them; the option of row M has none. Over the k - 1
   others that is less than N - M + 1: too few. From M = 0, m > 0 leaves less than T_i(N) + d, again less than N + 1.

Borders between shares need no special case: due rows and deadlines are read off T, which is known in advance.

Where the shares are constant with period P, two sequences with different open turns agree once the deadlines of the open
turns are past: their difference never gains a later deadline than its latest. So a stage soon repeats itself every P rows,
until turns are due whose deadlines lie beyond its end. The code detects this and does not assume it: rows of a stage are
assigned one by one until the counts have the same distance to T as one or more periods before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Cycle:
    """Options of the rows from `first_row` on, repeated until the next cycle begins."""

    first_row: int
    counts: tuple[int, ...]
    """Rows that each option had before `first_row`."""
    options: list[int]


class IdealCounts:
    """T of this module: the count that each option should have after every row, as integers over one denominator."""

    def __init__(self, borders: Sequence[int], parts: Sequence[Sequence[int]]) -> None:
        """Take the first row of each stage, and the integer parts of each option in it."""
        self.borders, self.parts = borders, parts
        # Options that ever have a share: the others get no turn.
        k = sum(any(column) for column in zip(*parts, strict=True))
        periods = [sum(stage) for stage in parts]
        self.d = math.lcm(*periods)
        # max: for a single option, 2k - 2 is 0.
        self.unit = self.d * max(2, 2 * k - 2)
        """One row; then shares are integers, and `self.d` is the d of this module."""
        # Without remainder, since each period divides the unit.
        self.step = [[w * self.unit // p for w in stage] for stage, p in zip(parts, periods, strict=True)]
        """(stages, options): growth with each row."""
        self.base = [[0] * len(parts[0])]
        """(stages, options): at the first row of the stage."""
        for n, first in enumerate(borders[1:]):
            self.base.append([b + s * (first - borders[n]) for b, s in zip(self.base[n], self.step[n], strict=True)])
        self.fine = max(max(stage) for stage in self.step) ** 2
        """Resolution of deadlines, which are fractions over one of the steps: at this one, different ones stay different."""

    def due(self, option: int, turn: int, stage: int = 0) -> tuple[float, int]:
        """Return the row at which a turn (from 1) becomes due, or infinity, and its stage; searches from `stage` on."""
        threshold = (turn - 1) * self.unit + self.d
        # `<`: a stage whose end just reaches the threshold has the row.
        while stage + 1 < len(self.base) and self.base[stage + 1][option] < threshold:
            stage += 1
        step = self.step[stage][option]
        if not step:
            return math.inf, stage  # no share in the last stage: the turn never comes
        # -(a // b) rounds up: the first row whose own share reaches the threshold.
        return self.borders[stage] - (self.base[stage][option] - threshold) // step - 1, stage

    def deadline(self, option: int, turn: int, stage: int = 0) -> tuple[float, int]:
        """Return where a turn (from 1) is overdue, in parts of `fine` of a row, or infinity, and its stage."""
        threshold = turn * self.unit - self.d
        # `<=`: T must exceed the threshold, not only reach it.
        while stage + 1 < len(self.base) and self.base[stage + 1][option] <= threshold:
            stage += 1
        step = self.step[stage][option]
        if not step:
            return math.inf, stage
        return self.borders[stage] * self.fine + (threshold - self.base[stage][option]) * self.fine // step, stage

    def end_of_cycles(self, stage: int) -> float:
        """Return the first row at which a turn is due that has its deadline after this stage, at most the stage's end."""
        if stage + 1 == len(self.borders):
            return math.inf
        ends = self.base[stage + 1]
        # Of each option, the first turn m with m - d >= T at the stage's end.
        first_turns = [(i, -(-(ends[i] + self.d) // self.unit)) for i, step in enumerate(self.step[stage]) if step]
        return min(self.borders[stage + 1], *(self.due(i, turn)[0] for i, turn in first_turns))


class Apportioner:
    """Assigns row after row to the due option with the nearest deadline."""

    def __init__(self, ideal: IdealCounts) -> None:
        self.ideal, self.row = ideal, 0
        self.counts = [0] * len(ideal.parts[0])
        self._queue_turns()

    def _queue_turns(self) -> None:
        """Queue each option's next turn as waiting; the next row moves those that are due."""
        options = range(len(self.counts))
        # Where the searches for due row and deadline go on: both ascend with the turn.
        self._stages = [(0, 0) for _ in options]
        # Heaps: of open turns by deadline, ties going to the lower option, and of waiting ones by due row.
        self._open: list[tuple[float, int]] = []
        self._waiting = [turn for i in options if (turn := self._next_turn(i))[0] < math.inf]
        heapify(self._waiting)

    def _next_turn(self, option: int) -> tuple[float, float, int]:
        turn, (due_stage, deadline_stage) = self.counts[option] + 1, self._stages[option]
        due, due_stage = self.ideal.due(option, turn, due_stage)
        deadline, deadline_stage = self.ideal.deadline(option, turn, deadline_stage)
        self._stages[option] = due_stage, deadline_stage
        return due, deadline, option

    def assign(self, n_rows: int) -> list[int]:
        """Return the options of the next rows."""
        waiting, open_turns, options = self._waiting, self._open, []
        for row in range(self.row, self.row + n_rows):
            while waiting and waiting[0][0] <= row:
                _, deadline, option = heappop(waiting)
                heappush(open_turns, (deadline, option))
            _, option = heappop(open_turns)  # never empty: see 1 of the proof
            options.append(option)
            self.counts[option] += 1
            turn = self._next_turn(option)
            if turn[0] < math.inf:
                heappush(waiting, turn)
        self.row += n_rows
        return options

    def skip(self, n_rows: int, counts: Sequence[int]) -> None:
        """Move on by `n_rows` rows, of which the options get `counts`."""
        self.row += n_rows
        self.counts = [count + more for count, more in zip(self.counts, counts, strict=True)]
        self._queue_turns()


def apportion(ideal: IdealCounts) -> list[Cycle]:
    """Return the endless sequence as cycles; the last one repeats for ever.

    Takes time and memory for some periods of each stage, however many rows it has.
    """
    apportioner, cycles = Apportioner(ideal), []
    for stage, first in enumerate(ideal.borders):
        parts = ideal.parts[stage]
        # After a period, T has grown by whole rows, by `parts`.
        period = sum(parts)
        end = ideal.borders[stage + 1] if stage + 1 < len(ideal.borders) else math.inf
        cycles_end = ideal.end_of_cycles(stage)
        counts, options = tuple(apportioner.counts), list[int]()
        seen: dict[tuple[int, ...], int] = {}
        while apportioner.row < end:
            n = len(options)
            # The counts less those of whole periods: equal values mean that the sequence repeats.
            ahead = tuple(c - n // period * w for c, w in zip(apportioner.counts, parts, strict=True))
            # Rows since the counts were as far ahead before; 0: never.
            length = n - seen.setdefault(ahead, n)
            if not length or apportioner.row + length > cycles_end:
                # One period at a time, up to the stage's end.
                options += apportioner.assign(int(min(period, end - apportioner.row)))
                continue
            # Rows before the repetition, which are not repeated themselves.
            if n > length:
                cycles.append(Cycle(first, counts, options[:-length]))
            # The counts where the last repetition began.
            before = tuple(c - length // period * w for c, w in zip(apportioner.counts, parts, strict=True))
            cycles.append(Cycle(apportioner.row - length, before, options[-length:]))
            if math.isinf(cycles_end):
                return cycles
            # Whole repetitions up to the end of cycles: `Cycle` repeats them, and nothing is stored.
            rounds = int(cycles_end - apportioner.row) // length
            apportioner.skip(rounds * length, [rounds * length // period * w for w in parts])
            first, counts, options, seen = apportioner.row, tuple(apportioner.counts), [], {}
            cycles_end = first  # no more cycles: the rest of the stage is assigned row by row
        if options:
            cycles.append(Cycle(first, counts, options))
    raise AssertionError("the last stage has no end")
