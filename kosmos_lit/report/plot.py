"""A metric's interval as a small image, on a line from 0 to a largest value; `templates/plot.html` draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kosmos_lit.evaluation.statistics import Metric

WIDTH, HEIGHT = 176, 18
"""Size in pixels."""
MARGIN = 6
"""Pixels at each end of the line, which leave room for a whole diamond."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a line shows; all values are in points."""

    metric: Metric | None = None
    """A dot with whiskers."""
    chance: float | None = None
    """A dotted tick."""
    paper: float | None = None
    """KOSMOS-1's value: an open diamond."""
    top: float = 100.0
    """Right end of the line."""

    @property
    def value(self) -> float | None:
        """The metric's value; None if it is undefined."""
        return None if self.metric is None or math.isnan(self.metric.value) else self.metric.value

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval; None if there is none."""
        if self.metric is None or math.isnan(self.metric.low) or math.isnan(self.metric.high):
            return None
        return self.metric.low, self.metric.high

    @property
    def label(self) -> str:
        """The plot in words."""
        measured = "" if self.value is None else f"measured {self.value:.1f}"
        interval = "" if not measured or self.ends is None else " [{:.1f}, {:.1f}]".format(*self.ends)
        chance = "" if self.chance is None else f"chance {self.chance:.1f}"
        paper = "" if self.paper is None else f"KOSMOS-1 {self.paper:.1f}"
        return "; ".join(text for text in (chance, measured + interval, paper) if text) or "nothing measured"

    def x(self, points: float) -> float:
        """Return the distance of a value from the left end of the image, in pixels."""
        # Clamped: CIDEr and intervals may lie outside of the line.
        return round(MARGIN + (WIDTH - 2 * MARGIN) * min(max(points, 0.0), self.top) / self.top, 1)
