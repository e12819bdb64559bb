"""What an evaluation prints: how far a task is, its main metric, and a table of all tasks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from math import nan
from typing import Any

from kosmos_lit.terminal import clock_time, table, write_line

LINE_SECONDS = 10.0
"""Between two lines of progress in a file or a pipe."""
REDRAW_SECONDS = 0.2
"""Between two on a terminal."""


class TaskProgress:
    """Prints the progress of one task."""

    def __init__(self, name: str, n_samples: int, n_before: int, world_size: int, *, quiet: bool) -> None:
        """Take the task's name, the number of its samples, and of those that an earlier start has evaluated."""
        self._name, self._n_samples, self._n_before, self._world_size = name, n_samples, n_before, world_size
        self._quiet = quiet
        self._n_own = 0
        self._start = self._last_line = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, n: int) -> None:
        """Count samples of this process; the other processes are assumed to be as fast."""
        self._n_own += n
        now = time.monotonic()
        if self._quiet or now - self._last_line < (REDRAW_SECONDS if self._is_terminal else LINE_SECONDS):
            return
        self._last_line = now
        # Never more than all: the other processes may have fewer samples.
        n_new = min(self._n_own * self._world_size, self._n_samples - self._n_before)
        # Never 0 seconds: the first line comes an interval after the start. Samples of earlier starts took no time.
        speed, n_left = n_new / self.seconds, self._n_samples - self._n_before - n_new
        time_left = f"  {clock_time(n_left / speed)} left" if speed else ""
        n_done = self._n_before + n_new
        write_line(f"{self._name}  {n_done:,} of {self._n_samples:,} samples  {speed:.1f}/s{time_left}")

    def end(self, entry: Mapping[str, Any]) -> None:
        """Print the task's main metric, by its entry in `metrics.json`."""
        if not self._quiet:
            before = f", {self._n_before:,} of them before" if self._n_before else ""
            failed = f", {entry['n_failed']:,} failed" if entry["n_failed"] else ""
            counts = f"{self._n_samples:,} samples in {clock_time(self.seconds)}{before}{failed}"
            write_line(f"{self._name}  {format_main_metric(entry)}  ({counts})", keep=True)


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
