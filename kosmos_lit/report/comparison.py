"""Several evaluations side by side: a model, and what it has to beat, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.results import Results, TaskResult, iterate_samples, read_results, without_nan
from kosmos_lit.evaluation.statistics import Metric, paired_difference
from kosmos_lit.report.page import page, wide
from kosmos_lit.report.tables import (
    in_points,
    interval,
    markdown,
    metric_label,
    number,
    plain,
    reference,
    shots_label,
    signed,
)

DATA_OPTIONS = ("path", "max_samples")
"""Options that say which samples there are; those are compared themselves."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much the first evaluation exceeds another one."""

    metric: Metric
    """In points."""
    paired: bool
    """Whether the interval is that of the differences sample by sample; else of the two intervals together."""

    @property
    def beyond(self) -> bool | None:
        """Whether the first is better beyond the interval; None if there is nothing to compare."""
        return None if math.isnan(self.metric.value) else self.metric.low > 0

    @property
    def worse(self) -> bool:
        """Whether the first is worse beyond the interval."""
        return self.metric.high < 0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of one task in every evaluation."""

    task: str
    metric: str
    n_shots: int
    headline: bool
    """Whether the figure stands for the task."""
    shows_images: bool
    """Whether any prompt of the first evaluation has images."""
    chance: float | None
    """In points."""
    metrics: tuple[Metric | None, ...]
    """In points, by evaluation."""
    differences: tuple[Difference | None, ...]
    """The first evaluation less each other one."""
    published: float | None
    """KOSMOS-1's, in points."""

    @property
    def beats_all(self) -> bool | None:
        """Whether the first evaluation is beyond every other one's interval; None if one of them is missing."""
        found = [d.beyond if d else None for d in self.differences]
        return None if None in found else all(found)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluations side by side."""

    names: tuple[str, ...]
    rows: tuple[Compared, ...]
    warnings: tuple[str, ...]
    """In what the evaluations differ that makes figures hard to compare."""

    @property
    def verdict(self) -> str:
        """Return in a sentence which tasks with images beat all other evaluations."""
        rows = [row for row in self.rows if row.headline and row.shows_images]
        missed = [row.task for row in rows if not row.beats_all]
        if not rows or len(self.names) < 2:
            return ""
        rest = f"; not: {', '.join(missed)}" if missed else ""
        others = " and ".join(self.names[1:])
        return f"{self.names[0]} beats {others} beyond the interval in {len(rows) - len(missed)} of {len(rows)} tasks{rest}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; where a number is not defined, it is None."""
        rows = [asdict(row) | {"beats_all": row.beats_all} for row in self.rows]
        found = {"names": self.names, "verdict": self.verdict, "warnings": self.warnings, "rows": rows}
        return without_nan(found)  # type: ignore[no-any-return]


def compare(folders: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """Set evaluations side by side; all differences are those of the first to the others.

    Raises: UserError if a folder has no results, if names do not fit, or if no task is common to the first and another.
    """
    found = [read_results(folder) for folder in folders]
    names = list(names) if names is not None else _names_of(folders)
    if len(names) != len(found) or len(set(names)) < len(names):
        raise UserError(f"report: {len(found)} folders need as many different names, got {', '.join(names) or 'none'}")
    first, *others = found
    for name, other in zip(names[1:], others, strict=True):
        if not first.tasks.keys() & other.tasks.keys():
            raise UserError(
                f"report: {names[0]} and {name} have no task in common: {', '.join(first.tasks)}; {', '.join(other.tasks)}"
            )
    rows, warnings = [], []
    for task in dict.fromkeys(name for results in found for name in results.tasks):
        made, notes = _compare_task(task, found, names)
        rows += made
        warnings += notes
    return Comparison(names=tuple(names), rows=tuple(rows), warnings=tuple(warnings))


def _names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report: a folder is given twice: {', '.join(map(str, folders))}")


def _compare_task(task: str, found: Sequence[Results], names: Sequence[str]) -> tuple[list[Compared], list[str]]:
    entries = [results.tasks.get(task) for results in found]
    read = [_Scores.read(results.samples(task)) if task in results.tasks else _Scores() for results in found]
    base = next(entry for entry in entries if entry)
    warnings = [f"{task}: {name} did not evaluate it." for name, entry in zip(names, entries, strict=True) if entry is None]
    for name, entry, scores in list(zip(names, entries, read, strict=True))[1:]:
        if entries[0] and entry:
            warnings += [f"{task}: {text}" for text in _unlike(names[0], entries[0], read[0], name, entry, scores)]
    metrics = dict.fromkeys(metric for entry in entries if entry for metric in entry.metrics)
    rows = []
    for metric in sorted(metrics, key=lambda metric: metric != base.main_metric):
        values = [in_points(entry.metrics[metric]) if entry and metric in entry.metrics else None for entry in entries]
        differences = [_difference(metric, values[0], read[0], v, s) for v, s in zip(values[1:], read[1:], strict=True)]
        rows.append(Compared(
            task=task, metric=metric, n_shots=base.n_shots, headline=metric == base.main_metric,
            shows_images=read[0].shows_images, chance=None if base.chance is None else 100 * base.chance,
            metrics=tuple(values), differences=tuple(differences),
            published=reference(base) if metric == base.main_metric else None,
        ))  # fmt: skip
    return rows, warnings


class _Scores:
    """Scores of a task's samples by key; samples that failed are not among them."""

    def __init__(self) -> None:
        self.of: dict[str, Mapping[str, float]] = {}
        self.shows_images = False

    @classmethod
    def read(cls, path: Path) -> _Scores:
        """Read what is needed of a file of samples, one sample at a time."""
        made = cls()
        for _, sample in iterate_samples(path):
            made.shows_images |= any(request.get("images") for request in sample.get("requests") or ())
            if not sample.get("error"):
                made.of[str(sample["key"])] = sample.get("scores") or {}
        return made

    def explain(self, metric: str, value: Metric) -> bool:
        """Return whether a figure, in points, is the mean of the samples' scores of that name."""
        found = [scores[metric] for scores in self.of.values() if scores.get(metric) is not None]
        return bool(found) and len(found) == len(self.of) and abs(100 * math.fsum(found) / len(found) - value.value) < 1e-6


def _difference(
    metric: str, first: Metric | None, ours: _Scores, second: Metric | None, theirs: _Scores
) -> Difference | None:
    """Return the difference of a figure, by samples that both have if the figure is a mean of their scores."""
    if first is None or second is None:
        return None
    common = ours.of.keys() & theirs.of.keys()
    if common and ours.explain(metric, first) and theirs.explain(metric, second):
        left, right = ({key: scores.of[key][metric] for key in sorted(common)} for scores in (ours, theirs))
        return Difference(metric=in_points(paired_difference(left, right)), paired=True)
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Difference(metric=Metric(value, low, high, min(first.n, second.n)), paired=False)


def _unlike(one: str, a: TaskResult, ours: _Scores, other: str, b: TaskResult, theirs: _Scores) -> list[str]:
    """Return in what two evaluations of a task differ beside the model."""
    notes = []
    if n := len(ours.of.keys() ^ theirs.of.keys()):
        both = len(ours.of.keys() & theirs.of.keys())
        notes.append(
            f"{n:,} samples have an answer only in {one} or only in {other}; differences are over {both:,} of both."
        )
    names = [k for k in {**a.options, **b.options} if k not in DATA_OPTIONS and a.options.get(k) != b.options.get(k)]
    notes += [f"{k} is {a.options.get(k)!r} in {one} and {b.options.get(k)!r} in {other}." for k in names]
    return notes


def comparison_markdown(c: Comparison) -> str:
    """Return a comparison as Markdown."""
    less = [f"less {name}" for name in c.names[1:]]
    header = ["task", "measure", "chance", *c.names, *less, *(["beats all"] if less else []), "KOSMOS-1"]
    rows = []
    for row in c.rows:
        cells = [row.task if row.headline else "", _measure(row), number(row.chance if row.headline else None)]
        cells += [f"{number(f.value)} {interval(f)}".strip() if f else number(None) for f in row.metrics]
        cells += [_said(d) for d in row.differences]
        cells += [_verdict(row)] if less else []
        rows.append([*cells, number(row.published)])
    parts = [markdown(header, rows, left=2), plain(c.verdict), _legend(c), "\n".join(f"- {plain(w)}" for w in c.warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluated(results: Results) -> str:
    """Return what an evaluation is of."""
    shown = "" if results.image_control == "true" else f", image_control: {results.image_control}"
    return f"{results.model.get('checkpoint') or results.folder}{shown}"


def _legend(c: Comparison) -> str:
    unpaired = any(d and not d.paired for row in c.rows for d in row.differences)
    several = " Differences are sample by sample; ▲ ▼ mark those beyond their interval." if len(c.names) > 1 else ""
    other = " °: no mean over samples; its interval is of both evaluations' intervals together." if unpaired else ""
    return f"Points with 95 % intervals.{several}{other}"


def _measure(row: Compared) -> str:
    return f"{metric_label(row.metric)}, {shots_label(row.n_shots)}"


def _said(d: Difference | None) -> str:
    if d is None or d.beyond is None:
        return number(None)
    mark = " ▲" if d.beyond else " ▼" if d.worse else ""
    return f"{signed(d.metric.value)} {interval(d.metric)}{'' if d.paired else '°'}{mark}"


def _verdict(row: Compared) -> str:
    """Return yes or no for a task's headline; nothing for other figures, and where no image is shown."""
    if not row.headline or row.beats_all is None:
        return ""
    return ("yes" if row.beats_all else "no") if row.shows_images else "no images"


def comparison_html(c: Comparison, found: Sequence[Results]) -> str:
    """Return a comparison as one self-contained page."""
    heads = [*c.names, *(f"less {name}" for name in c.names[1:]), *(["beats all"] if len(c.names) > 1 else []), "KOSMOS-1"]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("task", "chance", *heads))
    rows = []
    for row in c.rows:
        name = f"{escape(row.task) if row.headline else ''}<small>{escape(_measure(row))}</small>"
        cells = [f"<td>{number(row.chance if row.headline else None)}</td>"]
        for i, f in enumerate(row.metrics):
            value = number(f.value if f else None)
            cells.append(f"<td>{value if i else f'<b class=ours>{value}</b>'}<small>{interval(f) if f else ''}</small></td>")
        for d in row.differences:
            colour = "" if d is None else "good" if d.beyond else "bad" if d.worse else ""
            value, _, rest = _said(d).partition(" ")
            cells.append(f'<td class="{colour}">{value}<small>{rest}</small></td>')
        cells += [f"<td>{_verdict(row)}</td>"] if len(c.names) > 1 else []
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}<td>{number(row.published)}</td></tr>')
    facts = {name: _evaluated(results) for name, results in zip(c.names, found, strict=True)}
    warnings = "".join(f"<li>{escape(text)}</li>" for text in c.warnings)
    parts = [f"<p><b>{escape(c.verdict)}</b></p>" if c.verdict else "", wide(f"<tr>{head}</tr>", rows)]
    parts += [f'<p class="soft">{escape(_legend(c))}</p>', f'<ul class="notes">{warnings}</ul>' if warnings else ""]
    return page("Evaluations side by side", facts, "", parts)
