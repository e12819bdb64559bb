"""The verb `report run`: losses and speed of runs by their logs, and where their settings differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

import yaml

from kosmos_lit.cli.overlays import value_at
from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.cli.run_log import logged
from kosmos_lit.errors import UserError
from kosmos_lit.terminal import table

REPORT = "report.json"
"""What `CaptionReport` writes at the end of a run."""
LONGEST_VALUE = 60
"""Characters of a setting in the table."""
Log = Mapping[int, Mapping[str, str]]
"""Rows of a log by step."""


@dataclass(frozen=True, kw_only=True)
class RunReportOptions:
    """Which runs, and how much of them."""

    folders: tuple[Path, ...]
    n_rows: int = 10
    """Number of steps whose losses are printed, evenly spaced over all that are logged."""

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise UserError(f"report run: --n_rows must be positive, got {self.n_rows}")


def run_parser() -> Parser:
    """Return the options of `report run`."""
    return verb_parser(
        "report run",
        RunReportOptions,
        positionals={"folders": ("+", "folder of a run")},
        description="Print the training loss of runs in nats a token, the latest validation loss, the median speed, the "
        "shares of exact answers if the run measured them, and of several runs the settings that differ.",
    )


def report_run(arguments: list[str]) -> None:
    """Print the losses and the speed of runs."""
    [o] = run_parser().read(arguments)
    training = {str(folder): logged(folder, "train/loss") for folder in o.folders}
    for folder, log in training.items():
        if not Path(folder).is_dir():
            raise UserError(f"report run: no folder {folder}")
        if not log:
            raise UserError(f"report run: {folder} is no run's folder: no training step is logged in {folder}/csv")
    validation = {str(folder): logged(folder, "val/loss") for folder in o.folders}
    parts = [summary_table(training, validation), losses_table(training, o.n_rows)]
    reports = {str(folder): _report(folder / REPORT) for folder in o.folders}
    if any(reports.values()):
        parts.append(reports_table(reports))
    if len(o.folders) > 1:
        parts.append(differing_settings({str(folder): _settings(folder / "config.yaml") for folder in o.folders}))
    print("\n\n".join(parts))


def summary_table(training: Mapping[str, Log], validation: Mapping[str, Log]) -> str:
    """Return a table of runs: the last step and its loss, the latest validation loss, medians of speed and data wait."""
    rows = []
    for name, log in training.items():
        last, held_out = max(log), validation[name]
        loss = f"{float(held_out[max(held_out)]['val/loss']):.3f}" if held_out else None
        speed, wait = _median(log, "tokens_per_second"), _median(log, "data_wait")
        cells = [None if speed is None else f"{speed:,.0f}", None if wait is None else f"{wait:.0%}"]
        rows.append([name, last, f"{float(log[last]['train/loss']):.3f}", loss, *cells])
    return table(["run", "step", "loss", "validation", "tokens/s", "data wait"], rows)


def losses_table(training: Mapping[str, Log], n_rows: int) -> str:
    """Return a table of training losses by step, `n_rows` of all logged steps, the last one among them."""
    steps = sorted(set().union(*training.values()))
    n = min(n_rows, len(steps))
    chosen = [steps[(i + 1) * len(steps) // n - 1] for i in range(n)]
    rows = [
        [step, *(f"{float(log[step]['train/loss']):.3f}" if step in log else None for log in training.values())]
        for step in chosen
    ]
    return table(["step", *training], rows, align="r")


def reports_table(reports: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of what `CaptionReport` measured at the end of each run, shares with three digits."""
    names = list(dict.fromkeys(name for report in reports.values() for name in report))
    rows = [[name, *(f"{report[name]:.3f}" if name in report else None for report in reports.values())] for name in names]
    return table([REPORT, *reports], rows)


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the settings that are not the same in all runs; a run without the setting has an empty cell."""
    names = sorted(set().union(*settings.values()))
    missing = object()
    rows = []
    for name in names:
        values = [table_.get(name, missing) for table_ in settings.values()]
        if any(value != values[0] for value in values):
            rows.append([name, *(None if value is missing else shorten(str(value), LONGEST_VALUE) for value in values)])
    return table(["setting", *settings], rows, align="l") if rows else "the settings are the same"


def _median(log: Log, metric: str) -> float | None:
    values = [float(row[metric]) for row in log.values() if row.get(metric)]
    return median(values) if values else None


def _report(path: Path) -> dict[str, float]:
    """Return the shares of exact answers in a run's report, by kind of task; none if the run wrote none."""
    if not path.is_file():
        return {}
    leaves = _flat(json.loads(path.read_text(encoding="utf-8")))
    return {name: value for name, value in leaves if "exact_match" in name and isinstance(value, float)}


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run's saved configuration by dotted name, none if the run saved none."""
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    folder = value_at(content, ("trainer", "default_root_dir"))
    # Each run has its own folder: a path within it is no other setting.
    return {name: _within(value, folder) for name, value in _flat(content) if value != folder}


def _within(value: Any, folder: Any) -> Any:
    inside = isinstance(value, str) and isinstance(folder, str) and value.startswith(f"{folder}/")
    return f"RUN{value[len(folder) :]}" if inside else value


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their dotted names; a list's places count from 0."""
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, node
