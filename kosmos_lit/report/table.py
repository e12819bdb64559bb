"""A table for people, once for Markdown and HTML: `templates/table.md` and `templates/table.html` render it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.report.plot import Plot

MISSING = "–"
"""Stands where there is no value."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The head of a column."""

    text: str
    group: str = ""
    """Stands above neighbouring columns with the same group; in Markdown, before the text of each."""
    is_number: bool = True
    """Whether Markdown aligns the column to the right."""
    is_below: bool = False
    """Whether a page has the column's cells below those of the first column, which saves width on a narrow screen."""
    is_page_only: bool = False
    """Whether Markdown leaves the column out."""

    @property
    def label(self) -> str:
        """The text with its group."""
        return f"{self.group}, {self.text}" if self.group else self.text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The cell of a row and a column."""

    text: str = ""
    detail: str = ""
    """Stands in small type below the text; in Markdown behind it, in brackets if the cell is the row's first."""
    alone: str = ""
    """What the cell says where its heading is not seen, such as "3 shots" for "3"; empty: its text."""
    style: str = ""
    """Class of the style sheet: ours, good, bad or nothing."""
    anchor: str = ""
    """Place in the page that the text leads to."""
    plot: Plot | None = None
    """An image instead of the text."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row; its first cell says what it is of."""

    cells: tuple[Cell, ...]
    """A cell for each heading."""
    style: str = ""
    """Class of the style sheet: ours, chance or nothing."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings and rows."""

    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        """Check that every row has a cell for each heading."""
        for row in self.rows:
            assert len(row.cells) == len(self.headings), f"{len(row.cells)} cells for {len(self.headings)} headings: {row}"

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of a page's columns after the first, with their numbers of columns; empty if there are none."""
        headings = [heading for heading in self.headings[1:] if not heading.is_below]
        # groupby joins neighbours only.
        groups = [(name, len(list(columns))) for name, columns in groupby(headings, key=lambda h: h.group)]
        return groups if any(name for name, _ in groups) else []

    def below(self, row: Row) -> str:
        """Return what stands below a row's first cell in a page."""
        cells = [cell for heading, cell in zip(self.headings, row.cells, strict=True) if heading.is_below]
        texts = [row.cells[0].detail, *(cell.alone or cell.text for cell in cells)]
        return ", ".join(text for text in texts if text)


def metric_cell(metric: Metric | None, style: str = "", missing: str = "") -> Cell:
    """Return a cell with a metric in points and its interval; of no metric, with the text for missing ones."""
    if metric is None:
        return Cell(text=missing, style=style)
    return Cell(text=number(metric.value), detail=interval(metric), style=style)


def number(points: float | None) -> str:
    """Return points with one decimal."""
    return MISSING if points is None or math.isnan(points) else f"{points:.1f}"


def signed(points: float) -> str:
    """Return a difference in points with its sign."""
    # A minus sign is as wide as the plus sign; a hyphen is not.
    return MISSING if math.isnan(points) else f"{points:+.1f}".replace("-", "−")


def interval(metric: Metric) -> str:
    """Return a metric's 95 % interval; empty if it has none."""
    return "" if math.isnan(metric.low) or math.isnan(metric.high) else f"[{metric.low:.1f}, {metric.high:.1f}]"
