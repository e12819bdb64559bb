"""Comparison of evaluations: paired differences of the first to each other one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.results import Results, TaskResult, iterate_samples, read_results, without_nan
from kosmos_lit.evaluation.statistics import Metric, paired_difference
from kosmos_lit.report.benchmarks import in_points, metric_label, reference, shots_label
from kosmos_lit.report.rendering import render_markdown, render_page
from kosmos_lit.report.table import MISSING, Cell, Heading, Row, Table, interval, metric_cell, number, signed

DATA_OPTIONS = ("path", "max_samples")
"""Options that select samples; the samples themselves are compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of the first evaluation less that of another one."""

    metric: Metric
    """In points."""
    paired: bool
    """Whether the interval is that of the differences sample by sample; else it combines the two intervals."""

    @property
    def is_better(self) -> bool | None:
        """Whether the first is better and the interval excludes 0; None if there is nothing to compare."""
        return None if math.isnan(self.metric.value) else self.metric.low > 0

    @property
    def is_worse(self) -> bool:
        """Whether the first is worse and the interval excludes 0."""
        return self.metric.high < 0


@dataclass(frozen=True, kw_only=True)
class ComparedMetric:
    """One metric of one task in every evaluation."""

    task: str
    metric: str
    n_shots: int
    is_main: bool
    """Whether it is the task's main metric."""
    shows_images: bool
    """Whether any prompt of the first evaluation has images."""
    chance: float | None
    """In points."""
    metrics: tuple[Metric | None, ...]
    """In points, by evaluation."""
    differences: tuple[Difference | None, ...]
    """The first evaluation less each of the others."""
    published: float | None
    """KOSMOS-1's, in points."""

    @property
    def beats_all(self) -> bool | None:
        """Whether the first evaluation is better than every other one; None if one of them is missing."""
        is_better = [d.is_better if d else None for d in self.differences]
        return None if None in is_better else all(is_better)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several evaluations, by metric."""

    names: tuple[str, ...]
    rows: tuple[ComparedMetric, ...]
    warnings: tuple[str, ...]
    """Differences between the evaluations that make metrics hard to compare."""

    @property
    def summary(self) -> str:
        """Return a sentence on how many tasks with images beat all other evaluations."""
        # Tasks without images say nothing about what a model sees.
        rows = [row for row in self.rows if row.is_main and row.shows_images]
        missed = [row.task for row in rows if not row.beats_all]
        if not rows or len(self.names) < 2:
            return ""
        exceptions = f"; not: {', '.join(missed)}" if missed else ""
        others = " and ".join(self.names[1:])
        count = f"{len(rows) - len(missed)} of {len(rows)} tasks"
        return f"{self.names[0]} beats {others} beyond the interval in {count}{exceptions}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; an undefined number is None."""
        rows = [asdict(row) | {"beats_all": row.beats_all} for row in self.rows]
        data = {"names": self.names, "summary": self.summary, "warnings": self.warnings, "rows": rows}
        return without_nan(data)  # type: ignore[no-any-return]


def compare(folders: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """Compare evaluations; differences are those of the first to each of the others.

    Raises: UserError if a folder has no results, if names do not fit, or if the first has no task in common with another.
    """
    evaluations = [read_results(folder) for folder in folders]
    names = list(names) if names is not None else _names_of(folders)
    if len(names) != len(evaluations) or len(set(names)) < len(names):
        raise UserError(f"report: {len(evaluations)} folders need as many different names, got {', '.join(names) or 'none'}")
    first, *others = evaluations
    for name, other in zip(names[1:], others, strict=True):
        if not first.tasks.keys() & other.tasks.keys():
            raise UserError(
                f"report: {names[0]} and {name} have no task in common: {', '.join(first.tasks)}; {', '.join(other.tasks)}"
            )
    rows, warnings = [], []
    # dict.fromkeys: each task once, in the order of the evaluations.
    for task in dict.fromkeys(name for results in evaluations for name in results.tasks):
        task_rows, task_warnings = _compare_task(task, evaluations, names)
        rows += task_rows
        warnings += task_warnings
    return Comparison(names=tuple(names), rows=tuple(rows), warnings=tuple(warnings))


def _names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that differ from one another."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    # Only equal paths have no ends that differ.
    raise UserError(f"report: a folder is given twice: {', '.join(map(str, folders))}")


def _compare_task(task: str, evaluations: Sequence[Results], names: Sequence[str]) -> tuple[list[ComparedMetric], list[str]]:
    entries = [results.tasks.get(task) for results in evaluations]
    scores = [_Scores.read(results.samples(task)) if task in results.tasks else _Scores() for results in evaluations]
    # The first evaluation that has the task, in case the first of all has not.
    base = next(entry for entry in entries if entry)
    warnings = [f"{task}: {name} did not evaluate it." for name, entry in zip(names, entries, strict=True) if entry is None]
    # The others, each against the first.
    for name, entry, other in list(zip(names, entries, scores, strict=True))[1:]:
        if entries[0] and entry:
            warnings += [f"{task}: {text}" for text in _warnings(names[0], entries[0], scores[0], name, entry, other)]
    metrics = dict.fromkeys(metric for entry in entries if entry for metric in entry.metrics)
    rows = []
    # False sorts first: the main metric, then the others in their order.
    for metric in sorted(metrics, key=lambda metric: metric != base.main_metric):
        values = [in_points(entry.metrics[metric]) if entry and metric in entry.metrics else None for entry in entries]
        differences = [_difference(metric, values[0], scores[0], v, s) for v, s in zip(values[1:], scores[1:], strict=True)]
        rows.append(
            ComparedMetric(
                task=task,
                metric=metric,
                n_shots=base.n_shots,
                is_main=metric == base.main_metric,
                shows_images=scores[0].shows_images,
                chance=None if base.chance is None else 100 * base.chance,
                metrics=tuple(values),
                differences=tuple(differences),
                published=reference(base) if metric == base.main_metric else None,
            )
        )
    return rows, warnings


class _Scores:
    """Scores of a task's samples by key, without failed samples."""

    def __init__(self) -> None:
        self.by_key: dict[str, Mapping[str, float]] = {}
        self.shows_images = False

    @classmethod
    def read(cls, path: Path) -> _Scores:
        """Read a file of samples, one at a time."""
        result = cls()
        for _, sample in iterate_samples(path):
            result.shows_images |= any(request.get("images") for request in sample.get("requests") or ())
            if not sample.get("error"):
                result.by_key[str(sample["key"])] = sample.get("scores") or {}
        return result

    def has_mean(self, metric: str, value: Metric) -> bool:
        """Return whether a metric, in points, is the mean of the samples' scores of that name."""
        values = [scores[metric] for scores in self.by_key.values() if scores.get(metric) is not None]
        # A score that some samples lack: the metric may be a mean of the others.
        if not values or len(values) < len(self.by_key):
            return False
        # 1e-6 points: the file's value has been added up in another order.
        return abs(100 * math.fsum(values) / len(values) - value.value) < 1e-6


def _difference(
    metric: str, first: Metric | None, ours: _Scores, second: Metric | None, others: _Scores
) -> Difference | None:
    """Return the difference of a metric, over the common samples if the metric is a mean of their scores."""
    if first is None or second is None:
        return None
    common = ours.by_key.keys() & others.by_key.keys()
    if common and ours.has_mean(metric, first) and others.has_mean(metric, second):
        # Sorted: the bootstrap draws places, so their order must not depend on a set's.
        left, right = ({key: scores.by_key[key][metric] for key in sorted(common)} for scores in (ours, others))
        return Difference(metric=in_points(paired_difference(left, right)), paired=True)
    value = first.value - second.value
    # Two independent intervals: their half-widths add in quadrature.
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Difference(metric=Metric(value, low, high, min(first.n, second.n)), paired=False)


def _warnings(one: str, a: TaskResult, ours: _Scores, other: str, b: TaskResult, others: _Scores) -> list[str]:
    """Return in which samples and options two evaluations of a task differ."""
    notes = []
    if n := len(ours.by_key.keys() ^ others.by_key.keys()):
        n_common = len(ours.by_key.keys() & others.by_key.keys())
        notes.append(
            f"{n:,} samples were answered only in {one} or only in {other}; differences are over the {n_common:,} in both."
        )
    names = [k for k in {**a.options, **b.options} if k not in DATA_OPTIONS and a.options.get(k) != b.options.get(k)]
    notes += [f"{k} is {a.options.get(k)!r} in {one} and {b.options.get(k)!r} in {other}." for k in names]
    return notes


def comparison_markdown(c: Comparison) -> str:
    """Return a comparison as Markdown."""
    return render_markdown("comparison.md", comparison=c, table=comparison_table(c), legend=_legend(c))


def comparison_html(c: Comparison, evaluations: Sequence[Results]) -> str:
    """Return a comparison as one self-contained page."""
    facts = {name: _evaluation_label(results) for name, results in zip(c.names, evaluations, strict=True)}
    return render_page(
        "comparison.html",
        title="Evaluations side by side",
        facts=facts,
        control="",
        comparison=c,
        table=comparison_table(c),
        legend=_legend(c),
    )


def comparison_table(c: Comparison) -> Table:
    """Return a comparison as a table for people."""
    several = len(c.names) > 1
    names = [*c.names, *(f"less {name}" for name in c.names[1:]), *(["beats all"] if several else []), "KOSMOS-1"]
    headings = (
        Heading(text="task", is_number=False),
        Heading(text="metric", is_number=False, is_below=True),
        *(Heading(text=name) for name in ("chance", *names)),
    )
    rows = []
    for row in c.rows:
        first, *others = row.metrics
        rows.append(
            Row(
                cells=(
                    Cell(text=row.task if row.is_main else ""),
                    Cell(text=_label(row)),
                    Cell(text=number(row.chance if row.is_main else None)),
                    metric_cell(first, "ours", MISSING),
                    *(metric_cell(m, missing=MISSING) for m in others),
                    *(_difference_cell(d) for d in row.differences),
                    *([Cell(text=_beats_all_text(row))] if several else []),
                    Cell(text=number(row.published)),
                )
            )
        )
    return Table(headings=headings, rows=tuple(rows))


def _evaluation_label(results: Results) -> str:
    """Return the checkpoint of an evaluation, and its image control."""
    control = "" if results.image_control == "true" else f", image_control: {results.image_control}"
    return f"{results.model.get('checkpoint') or results.folder}{control}"


def _legend(c: Comparison) -> str:
    unpaired = any(d and not d.paired for row in c.rows for d in row.differences)
    several = " Differences are sample by sample; ▲ ▼ mark those whose interval excludes 0." if len(c.names) > 1 else ""
    other = " °: not a mean over samples; the interval combines those of both evaluations." if unpaired else ""
    return f"Points with 95 % intervals.{several}{other}"


def _label(row: ComparedMetric) -> str:
    return f"{metric_label(row.metric)}, {shots_label(row.n_shots)}"


def _difference_cell(d: Difference | None) -> Cell:
    if d is None or d.is_better is None:
        return Cell(text=MISSING)
    style, mark = ("good", " ▲") if d.is_better else ("bad", " ▼") if d.is_worse else ("", "")
    detail = f"{interval(d.metric)}{'' if d.paired else '°'}{mark}"
    return Cell(text=signed(d.metric.value), detail=detail, style=style)


def _beats_all_text(row: ComparedMetric) -> str:
    """Return yes, no or "no images" for a task's main metric; nothing for other metrics."""
    if not row.is_main or row.beats_all is None:
        return ""
    return ("yes" if row.beats_all else "no") if row.shows_images else "no images"
