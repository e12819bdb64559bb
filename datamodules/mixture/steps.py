"""Which rows each optimizer step reads: one step's rows follow the other's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Steps and their rows; the rows of a step may change where a run is resumed."""

    borders: tuple[tuple[int, int, int], ...]
    """(steps done, rows read by then, rows of a step from there on), ascending."""

    @classmethod
    def constant(cls, global_batch_rows: int) -> Steps:
        """Return the steps of a run that begins at row 0."""
        return cls(((0, 0, global_batch_rows),))

    @classmethod
    def from_list(cls, borders: Iterable[Sequence[int]]) -> Steps:
        """Undo `to_list`."""
        return cls(tuple((step, row, size) for step, row, size in borders))

    def to_list(self) -> list[list[int]]:
        """Return plain data for a checkpoint."""
        return [list(border) for border in self.borders]

    def resume(self, step: int, global_batch_rows: int) -> Steps:
        """Return the steps of a run that goes on after `step` steps."""
        # A border at `step` itself has no steps yet: the new one replaces it.
        past = tuple(border for border in self.borders if border[0] < step)
        # No border where steps keep their size.
        if past and past[-1][2] == global_batch_rows:
            return Steps(past)
        return Steps((*past, (step, self.row(step), global_batch_rows)))

    def row(self, step: int) -> int:
        """Return the rows read by `step` steps, which is also the first row of the next one."""
        # The last border at the step or before it.
        first, row, size = self.borders[bisect_right(self.borders, step, key=lambda border: border[0]) - 1]
        return row + (step - first) * size

    def step(self, row: int) -> int:
        """Return the number of steps whose rows all lie before `row`."""
        first, start, size = self.borders[bisect_right(self.borders, row, key=lambda border: border[1]) - 1]
        return first + (row - start) // size

    def rows(self, step: int) -> range:
        """Return the rows of a step, the first one being 1 as in the log."""
        return range(self.row(step - 1), self.row(step))
