"""Tables of our metrics beside the published ones, a table for each benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kosmos_lit.evaluation.results import NAN, Results, TaskResult
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.report.published import OURS, Benchmark, published, published_results
from kosmos_lit.report.table import Cell, Heading, Row, Table, metric_cell, number

LABELS = {
    "cider": "CIDEr",
    "spice": "SPICE",
    "meteor": "METEOR",
    "vqa_accuracy": "VQA accuracy",
    "roc_auc": "ROC AUC",
    "f1": "F1",
    "macro_f1": "macro F1",
    "cider_plain": "CIDEr of plain words",
}
"""Names of metrics in tables; for others the task's own name is printed."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    metric: str
    shots: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table: a model's metrics, in points."""

    model: str
    cells: Mapping[Column, Metric]
    """A published value has no interval: its ends are NaN."""
    ours: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """A benchmark's metrics by model, ours first."""

    title: str
    source: str
    """Where the published values are from; empty if there are none."""
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    chance: float | None
    """In points."""
    notes: tuple[str, ...]
    tasks: tuple[TaskResult, ...]
    """Our tasks in the table."""

    @property
    def table(self) -> Table:
        """The metrics as a table for people: metrics above numbers of shots."""
        columns = [Heading(text=shots_label(c.shots), group=metric_label(c.metric)) for c in self.columns]
        rows = [
            Row(
                cells=(Cell(text=line.model, detail=line.note), *(metric_cell(line.cells.get(c)) for c in self.columns)),
                style="ours" if line.ours else "",
            )
            for line in self.lines
        ]
        if self.chance is not None:
            # One value for the task, whatever the column.
            cells = (Cell(text="chance"), Cell(text=number(self.chance)), *(Cell() for _ in self.columns[1:]))
            rows.append(Row(cells=cells, style="chance"))
        return Table(headings=(Heading(text="model", is_number=False), *columns), rows=tuple(rows))


def benchmark_tables(results: Results, model: str = "this model") -> list[BenchmarkTable]:
    """Return a table for each benchmark of an evaluation, in the paper's order, unpublished ones last."""
    groups: dict[str, list[TaskResult]] = {}
    for task in results.tasks.values():
        key = task.published if published(task.published) else None
        # Tasks without published results share a table if title and options are equal.
        groups.setdefault(key or f"{task.title} {_options_without_shots(task)}", []).append(task)
    benchmarks = published_results().benchmarks
    order = [*(key for key in benchmarks if key in groups), *(key for key in groups if key not in benchmarks)]
    by_key = {key: benchmark_table(groups[key], benchmarks.get(key), model) for key in order}
    language = [key for key in published_results().language if key in by_key]
    average = _average([by_key[key] for key in language], model)
    # The average of the language tasks stands after the last of them.
    return [t for key, table in by_key.items() for t in ([table, *average] if [key] == language[-1:] else [table])]


def benchmark_table(tasks: Sequence[TaskResult], benchmark: Benchmark | None, model: str) -> BenchmarkTable:
    """Return one benchmark's table.

    Tasks that differ in nothing but the number of demonstrations are one row; those with other options have their own.
    """
    rows: dict[str, list[TaskResult]] = {}
    tasks = sorted(tasks, key=lambda task: task.n_shots)
    for task in tasks:
        rows.setdefault(_options_without_shots(task), []).append(task)
    lines = [_our_line(row, model if len(rows) == 1 else f"{model}: {row[0].name}") for row in rows.values()]
    if benchmark is not None:
        lines += [_published_line(row.model, row.note, row.metrics) for row in benchmark.rows]
    chance = tasks[0].chance
    return BenchmarkTable(
        # Unpublished tasks may have equal titles: a table of one has the task's name too.
        title=benchmark.title if benchmark else tasks[0].title if len(tasks) > 1 else f"{tasks[0].title} ({tasks[0].name})",
        source=f"{benchmark.source}; split: {benchmark.split}" if benchmark else "",
        columns=_columns(lines),
        lines=tuple(lines),
        chance=None if chance is None else 100 * chance,
        notes=(*_notes(tasks, benchmark), *(benchmark.notes if benchmark else ())),
        tasks=tuple(tasks),
    )


def _options_without_shots(task: TaskResult) -> str:
    """Return a task's options as text, but for the number of demonstrations."""
    return json.dumps({k: v for k, v in task.options.items() if k != "n_shots"}, sort_keys=True, default=str)


def _our_line(tasks: Sequence[TaskResult], model: str) -> Line:
    cells = {Column(name, t.n_shots): in_points(metric) for t in tasks for name, metric in t.metrics.items()}
    return Line(model=model, cells=cells, ours=True)


def _published_line(model: str, note: str, metrics: Mapping[str, Mapping[int, float]]) -> Line:
    cells = {Column(name, shots): Metric(x, NAN, NAN, 0) for name, row in metrics.items() for shots, x in row.items()}
    return Line(model=model, note=note, cells=cells)


def _columns(lines: Iterable[Line]) -> tuple[Column, ...]:
    """Return the columns by metric, the published ones first, then by number of shots."""
    lines = sorted(lines, key=lambda line: line.ours)  # False sorts first
    names = list(dict.fromkeys(column.metric for line in lines for column in line.cells))
    return tuple(sorted({c for line in lines for c in line.cells}, key=lambda c: (names.index(c.metric), c.shots)))


def _notes(tasks: Sequence[TaskResult], benchmark: Benchmark | None) -> list[str]:
    """Return notes on how our samples and metrics differ from those of the published values."""
    counts: dict[str, list[str]] = {}
    for task in tasks:
        counts.setdefault(sample_counts(task), []).append(task.name)
    paper = f"; {benchmark.n_samples:,} in the paper" if benchmark and benchmark.n_samples else ""
    notes = [f"{', '.join(names)}: {count}{paper}." for count, names in counts.items()]
    if benchmark:
        official = list(dict.fromkeys(name for row in benchmark.rows for name in row.metrics))
        ours = {name for task in tasks for name in task.metrics}
        missing = [metric_label(name) for name in official if name not in ours]
        notes += [f"Not measured: {', '.join(missing)}."] if missing else []
        other = [metric_label(name) for name in sorted(ours - set(official))]
        notes += [f"Not in the paper: {', '.join(other)}."] if other else []
    return notes


def _average(parts: Sequence[BenchmarkTable], model: str) -> list[BenchmarkTable]:
    """Return the table of the mean of the language tasks if all were run with a common number of shots, else nothing."""
    ours = [{c: f for line in table.lines if line.ours for c, f in line.cells.items()} for table in parts]
    # A mean over fewer tasks would not be the paper's.
    if len(parts) < len(published_results().language):
        return []
    common = [c for c in ours[0] if c.metric == "accuracy" and all(c in cells for cells in ours)]
    if not common:
        return []
    lines = [Line(model=model, ours=True, cells={c: mean_of([cells[c] for cells in ours]) for c in common})]
    mean = published_results().language_mean
    lines += [_published_line(row.model, row.note, row.metrics) for row in mean.rows]
    return [
        BenchmarkTable(
            title=mean.title,
            source=mean.source,
            columns=_columns(lines),
            lines=tuple(lines),
            chance=None,
            notes=mean.notes,
            tasks=(),
        )
    ]


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """Return the mean of independent metrics, their half-intervals added in quadrature."""
    n = len(metrics)
    value = sum(m.value for m in metrics) / n
    below = math.sqrt(sum((m.value - m.low) ** 2 for m in metrics)) / n
    above = math.sqrt(sum((m.high - m.value) ** 2 for m in metrics)) / n
    return Metric(value, value - below, value + above, sum(m.n for m in metrics))


def in_points(metric: Metric) -> Metric:
    """Return a metric times 100."""
    return Metric(100 * metric.value, 100 * metric.low, 100 * metric.high, metric.n)


def reference(task: TaskResult) -> float | None:
    """Return KOSMOS-1's published value of a task's main metric with as many shots, in points; None if there is none."""
    benchmark = published(task.published)
    rows = [row for row in benchmark.rows if row.model == OURS] if benchmark else []
    return next((row.metrics.get(task.main_metric, {}).get(task.n_shots) for row in rows), None)


def metric_label(name: str) -> str:
    """Return a metric's name for people."""
    return LABELS.get(name, name.replace("_", " "))


def shots_label(shots: int) -> str:
    return f"{shots} shot{'' if shots == 1 else 's'}"


def sample_counts(task: TaskResult) -> str:
    """Return how many samples a task has, and how many failed by reason."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(task.failures.items(), key=lambda item: -item[1]))
    failed = f", {task.n_failed:,} of them failed and in no metric ({reasons})" if task.n_failed else ""
    return f"{task.n_samples:,} samples{failed}"
