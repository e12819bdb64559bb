"""A run's log and reports as files: read without the training code, so that a report starts at once."""

from __future__ import annotations

import csv
from pathlib import Path


def read_log(run: Path) -> dict[int, dict[str, str]]:
    """Return a run's logged training steps by number, over all its starts; of a repeated step the last record."""
    return logged(run, "train/loss")


def logged(run: Path, metric: str) -> dict[int, dict[str, str]]:
    """Return the rows of a run's log that have a metric, as `read_log`; training and validation have rows of their own."""
    steps: dict[int, dict[str, str]] = {}
    files = (run / "csv").glob("version_*/metrics.csv")
    for path in sorted(files, key=lambda p: int(p.parent.name.rpartition("_")[2])):  # version_10 is after version_9
        with path.open(encoding="utf-8", newline="") as file:
            steps |= {int(float(row["step"])): row for row in csv.DictReader(file) if row.get(metric)}
    return steps
