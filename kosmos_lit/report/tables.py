"""Our figures beside the published ones: tables as data, and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kosmos_lit.evaluation.results import NAN, Results, TaskResult
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.report.published import LANGUAGE, LANGUAGE_AVERAGE, OURS, PUBLISHED, Benchmark, published

LABELS = {
    "cider": "CIDEr", "spice": "SPICE", "meteor": "METEOR", "vqa_accuracy": "VQA accuracy", "roc_auc": "ROC AUC", "f1": "F1",
    "macro_f1": "macro F1", "cider_plain": "CIDEr of plain words",
}  # fmt: skip
"""Names of measures in tables; others are shown as the task calls them."""
NONE = "–"
"""What stands where there is no figure."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    metric: str
    shots: int

    @property
    def label(self) -> str:
        return f"{metric_label(self.metric)}, {shots_label(self.shots)}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table: a model's figures, in points."""

    model: str
    cells: Mapping[Column, Metric]
    """A published figure has no interval: its ends are NaN."""
    ours: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark's figures, ours first."""

    title: str
    source: str
    """Where the others' figures are from; empty if there are none."""
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    chance: float | None
    """In points."""
    notes: tuple[str, ...]
    tasks: tuple[TaskResult, ...]
    """Whose figures are ours."""


def tables(results: Results, model: str = "this model") -> list[Table]:
    """Return a table for each benchmark of an evaluation, in the paper's order, benchmarks of one's own last."""
    groups: dict[str, list[TaskResult]] = {}
    for task in results.tasks.values():
        known = task.published if published(task.published) else None
        groups.setdefault(known or f"{task.title} {_but_shots(task)}", []).append(task)
    order = [*(key for key in PUBLISHED if key in groups), *(key for key in groups if key not in PUBLISHED)]
    made = {key: benchmark_table(groups[key], PUBLISHED.get(key), model) for key in order}
    average = _average([made[key] for key in LANGUAGE if key in made], model)
    last = [key for key in LANGUAGE if key in made][-1:]
    return [t for key, table in made.items() for t in ([table, *average] if [key] == last else [table])]


def benchmark_table(tasks: Sequence[TaskResult], benchmark: Benchmark | None, model: str) -> Table:
    """Return one benchmark's table.

    Tasks that differ in nothing but the number of demonstrations are one row; those with other options have their own.
    """
    rows: dict[str, list[TaskResult]] = {}
    tasks = sorted(tasks, key=lambda task: task.n_shots)
    for task in tasks:
        rows.setdefault(_but_shots(task), []).append(task)
    lines = [_our_line(row, model if len(rows) == 1 else f"{model}: {row[0].name}") for row in rows.values()]
    if benchmark is not None:
        lines += [_published_line(row.model, row.note, row.metrics) for row in benchmark.rows]
    chance = tasks[0].chance
    return Table(
        title=benchmark.title if benchmark else tasks[0].title if len(tasks) > 1 else f"{tasks[0].title} ({tasks[0].name})",
        source=f"KOSMOS-1 paper, {benchmark.table}; split: {benchmark.split}" if benchmark else "",
        columns=_columns(lines), lines=tuple(lines), chance=None if chance is None else 100 * chance,
        notes=(*_notes(tasks, benchmark), *(benchmark.notes if benchmark else ())), tasks=tuple(tasks),
    )  # fmt: skip


def _but_shots(task: TaskResult) -> str:
    """Return what two tasks have in common if only the number of demonstrations differs."""
    return json.dumps({k: v for k, v in task.options.items() if k != "n_shots"}, sort_keys=True, default=str)


def _our_line(tasks: Sequence[TaskResult], model: str) -> Line:
    cells = {Column(name, t.n_shots): in_points(metric) for t in tasks for name, metric in t.metrics.items()}
    return Line(model=model, cells=cells, ours=True)


def _published_line(model: str, note: str, metrics: Mapping[str, Mapping[int, float]]) -> Line:
    cells = {Column(name, shots): Metric(x, NAN, NAN, 0) for name, row in metrics.items() for shots, x in row.items()}
    return Line(model=model, note=note, cells=cells)


def _columns(lines: Iterable[Line]) -> tuple[Column, ...]:
    """Return the columns by measure, the published ones first, and by demonstrations."""
    lines = sorted(lines, key=lambda line: line.ours)
    measures = list(dict.fromkeys(column.metric for line in lines for column in line.cells))
    return tuple(sorted({c for line in lines for c in line.cells}, key=lambda c: (measures.index(c.metric), c.shots)))


def _notes(tasks: Sequence[TaskResult], benchmark: Benchmark | None) -> list[str]:
    """Return how our samples and measures differ from what the others' figures are of."""
    counts: dict[str, list[str]] = {}
    for task in tasks:
        counts.setdefault(counted(task), []).append(task.name)
    paper = f"; {benchmark.n_samples:,} in the paper" if benchmark and benchmark.n_samples else ""
    notes = [f"{', '.join(names)}: {count}{paper}." for count, names in counts.items()]
    if benchmark:
        official = list(dict.fromkeys(name for row in benchmark.rows for name in row.metrics))
        ours = {name for task in tasks for name in task.metrics}
        missing = [metric_label(name) for name in official if name not in ours]
        notes += [f"Not measured here: {', '.join(missing)}."] if missing else []
        other = [metric_label(name) for name in sorted(ours - set(official))]
        notes += [f"Not in the paper: {', '.join(other)}."] if other else []
    return notes


def _average(parts: Sequence[Table], model: str) -> list[Table]:
    """Return the table of the mean of the language tasks, if there is a number of demonstrations that all of them have."""
    ours = [{c: f for line in table.lines if line.ours for c, f in line.cells.items()} for table in parts]
    if len(parts) < len(LANGUAGE):
        return []
    common = [c for c in ours[0] if c.metric == "accuracy" and all(c in cells for cells in ours)]
    if not common:
        return []
    lines = [Line(model=model, ours=True, cells={c: mean_of([cells[c] for cells in ours]) for c in common})]
    lines += [_published_line(row.model, row.note, row.metrics) for row in LANGUAGE_AVERAGE.rows]
    return [Table(
        title=LANGUAGE_AVERAGE.title, source=f"KOSMOS-1 paper, {LANGUAGE_AVERAGE.table}", columns=_columns(lines),
        lines=tuple(lines), chance=None, notes=LANGUAGE_AVERAGE.notes, tasks=(),
    )]  # fmt: skip


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """Return the plain mean of independent figures; its interval adds the squares of their intervals' halves."""
    n = len(metrics)
    value = sum(f.value for f in metrics) / n
    below = math.sqrt(sum((f.value - f.low) ** 2 for f in metrics)) / n
    above = math.sqrt(sum((f.high - f.value) ** 2 for f in metrics)) / n
    return Metric(value, value - below, value + above, sum(f.n for f in metrics))


def in_points(metric: Metric) -> Metric:
    """Return a figure times 100, as tables have it."""
    return Metric(100 * metric.value, 100 * metric.low, 100 * metric.high, metric.n)


def reference(task: TaskResult) -> float | None:
    """Return what KOSMOS-1 has for a task's headline with as many demonstrations, in points; None if it is not published."""
    benchmark = published(task.published)
    rows = [row for row in benchmark.rows if row.model == OURS] if benchmark else []
    return next((row.metrics.get(task.main_metric, {}).get(task.n_shots) for row in rows), None)


def metric_label(name: str) -> str:
    """Return a measure's name for people."""
    return LABELS.get(name, name.replace("_", " "))


def shots_label(shots: int) -> str:
    return f"{shots} shot{'' if shots == 1 else 's'}"


def number(points: float | None) -> str:
    """Return points with one decimal."""
    return NONE if points is None or math.isnan(points) else f"{points:.1f}"


def signed(points: float) -> str:
    """Return a difference in points with its sign."""
    return NONE if math.isnan(points) else f"{points:+.1f}".replace("-", "−")


def interval(metric: Metric) -> str:
    """Return a figure's 95 % interval, nothing if it has none."""
    return "" if math.isnan(metric.low) or math.isnan(metric.high) else f"[{metric.low:.1f}, {metric.high:.1f}]"


def counted(task: TaskResult) -> str:
    """Return how many samples a task has, and what became of those that failed."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(task.failures.items(), key=lambda item: -item[1]))
    failed = f", {task.n_failed:,} of them failed and in no figure ({reasons})" if task.n_failed else ""
    return f"{task.n_samples:,} samples{failed}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return a Markdown table; columns after the first `left` are numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    cells = ([plain(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in ([plain(cell) for cell in header], rule, *cells))


def plain(text: str) -> str:
    """Return text that Markdown shows as it is where it could begin a tag or a column."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " ")):
        text = text.replace(mark, entity)
    return text
