"""The verb `report run`: losses and speed of runs by their logs, and where their settings differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError
from kosmos_lit.terminal import table

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
        description="Print the training loss of runs in nats a token, the latest validation loss, the median speed, and of "
        "several runs the settings that differ.",
    )


def report_run(arguments: list[str]) -> None:
    """Print the losses and the speed of runs."""
    [o] = run_parser().read(arguments)
    from kosmos_lit.cli.verify_resume import logged

    training = {str(folder): logged(folder, "train/loss") for folder in o.folders}
    for folder, log in training.items():
        if not log:
            raise UserError(f"report run: no training step is logged in {folder}/csv")
    validation = {str(folder): logged(folder, "val/loss") for folder in o.folders}
    parts = [summary_table(training, validation), losses_table(training, o.n_rows)]
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


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the settings that are not the same in all runs; a run without the setting has an empty cell."""
    names = sorted(set().union(*settings.values()))
    missing = object()
    rows = []
    for name in names:
        values = [table_.get(name, missing) for table_ in settings.values()]
        if any(value != values[0] for value in values):
            rows.append([name, *(None if value is missing else str(value) for value in values)])
    return table(["setting", *settings], rows, align="l") if rows else "the settings are the same"


def _median(log: Log, metric: str) -> float | None:
    values = [float(row[metric]) for row in log.values() if row.get(metric)]
    return median(values) if values else None


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run's saved configuration by dotted name, none if the run saved none."""
    return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")))) if path.is_file() else {}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, node
