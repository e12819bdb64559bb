"""What an evaluation prints: how far a task is, its main metric, and a table of all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from kosmos_lit.terminal import Progress, clock_time, table

LINE_SECONDS = 10.0
"""Between two lines of progress in a file or a pipe."""


class TaskProgress(Progress):
    """Prints the progress of one task."""

    def __init__(self, name: str, n_samples: int, n_before: int, world_size: int, *, quiet: bool) -> None:
        """Take the task's name, the number of its samples, and of those that an earlier start has evaluated."""
        super().__init__(name, n_samples, "samples", n_before=n_before, quiet=quiet, line_seconds=LINE_SECONDS)
        self._n_samples, self._world_size = n_samples, world_size

    def add(self, n: int = 1) -> None:
        """Count samples of this process; the other processes are assumed to be as fast."""
        # Never more than all: the other processes may have fewer samples.
        super().add(min(n * self._world_size, self._n_samples - self.n_before - self.n_new))

    def end_with(self, entry: Mapping[str, Any]) -> None:
        """Print the task's main metric, by its entry in `metrics.json`."""
        before = f", {self.n_before:,} of them before" if self.n_before else ""
        failed = f", {entry['n_failed']:,} failed" if entry["n_failed"] else ""
        counts = f"{self._n_samples:,} samples in {clock_time(self.seconds)}{before}{failed}"
        self.end(f"{self.title}  {format_main_metric(entry)}  ({counts})")


def format_main_metric(entry: Mapping[str, Any]) -> str:
    """Return a task's main metric for people, 100 times its value: accuracy 61.7 [52.5, 70.0]."""
    metric = entry["metrics"].get(entry["main_metric"])
    if metric is None:
        return f"no {entry['main_metric']}"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{entry['main_metric']} {value:.1f} [{low:.1f}, {high:.1f}]"


def metrics_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the tasks' main metrics, 100 times their values, with their intervals."""
    rows = []
    for name, entry in entries.items():
        # A task whose samples all failed has no metrics, but a line.
        metric = entry["metrics"].get(entry["main_metric"], {"value": nan, "low": nan, "high": nan})
        value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
        chance = None if entry["chance"] is None else f"{100 * entry['chance']:.1f}"
        numbers = [f"{value:.1f}", f"{low:.1f} to {high:.1f}", chance, entry["n_samples"], entry["n_failed"]]
        rows.append([name, entry["main_metric"], *numbers])
    return table(["task", "metric", "value", "95 % interval", "chance", "samples", "failed"], rows, align="llr")
