"""An evaluation's results as a report for people: `report.md` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kosmos_lit.evaluation.results import Results, TaskResult, read_results
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.files import write_atomically
from kosmos_lit.report.benchmarks import (
    BenchmarkTable,
    benchmark_tables,
    in_points,
    metric_label,
    reference,
    shots_label,
)
from kosmos_lit.report.cards import sample_cards
from kosmos_lit.report.plot import Plot
from kosmos_lit.report.rendering import render_markdown, render_page
from kosmos_lit.report.samples import select_samples
from kosmos_lit.report.table import MISSING, Cell, Heading, Row, Table, metric_cell, number, signed

CONTROLS: Mapping[str, str] = {
    "shuffled": "Control: every sample is shown another sample's images.",
    "blank": "Control: even grey stands in the place of every image.",
    "none": "Control: no images are shown.",
}
"""Banners of reports on image controls."""
POINTS = "Points: 100 times a share, or times CIDEr; in brackets the 95 % interval of a bootstrap over samples."
TOPS = {"cider": 150.0, "cider_plain": 150.0}
"""Right ends of interval plots in points, by metric; 100 for all others."""
KEY = {
    "measured, 95 % interval": Plot(metric=Metric(50, 40, 60, 1)),
    "chance": Plot(chance=50),
    "KOSMOS-1": Plot(paper=50),
}
"""The marks of interval plots, by what they mean."""


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write `report.md` and `report.html` from a folder's `metrics.json` and `TASK/samples.jsonl`; return their paths.

    Args:
        folder: of the results.
        output: folder of the reports; None: the same.

    Raises: UserError if there are no results, or if a file is not what an evaluation writes.
    """
    results = read_results(folder)
    benchmarks = benchmark_tables(results)
    texts = {"report.md": markdown_report(results, benchmarks), "report.html": html_report(results, benchmarks)}
    return write_texts(output or folder, texts)


def write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write text files by name into a folder; return their paths."""
    paths = {folder / name: text for name, text in texts.items()}
    for path, text in paths.items():
        # A dataset may have half of a surrogate pair, which UTF-8 cannot say: a question mark stands for it.
        write_atomically(path, text.encode(errors="replace"))
    return list(paths)


def title_of(results: Results) -> str:
    """Return the title of a report, with the checkpoint's name."""
    checkpoint = results.model.get("checkpoint")
    return f"Evaluation of {Path(str(checkpoint)).name}" if checkpoint else "Evaluation"


def model_facts(results: Results) -> dict[str, str]:
    """Return the facts about the evaluated model and the evaluation, as text by name."""
    facts = {**results.model, "machine": results.machine, "date": results.date}
    # Nested facts, such as the model's configuration, are left to metrics.json.
    plain_values = {name: value for name, value in facts.items() if value and isinstance(value, int | float | str)}
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in plain_values.items()}


def markdown_report(results: Results, benchmarks: Sequence[BenchmarkTable]) -> str:
    """Return an evaluation's tables as Markdown."""
    return render_markdown("evaluation.md", **_values(results), benchmarks=benchmarks)


def html_report(results: Results, benchmarks: Sequence[BenchmarkTable]) -> str:
    """Return an evaluation's tables with selected samples as one self-contained page."""
    samples = {
        task.name: sample_cards(
            select_samples(results.samples(task.name), task.main_metric, seed=task.seed), results.image_control
        )
        for task in results.tasks.values()
    }
    anchors = {task.name: f"table-{i}" for i, benchmark in enumerate(benchmarks) for task in benchmark.tasks}
    return render_page(
        "evaluation.html", **_values(results, anchors), anchors=anchors, benchmarks=benchmarks, samples=samples, key=KEY
    )


def _values(results: Results, anchors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what both templates show above the benchmarks."""
    return {
        "title": title_of(results),
        "facts": model_facts(results),
        "control": CONTROLS.get(results.image_control, ""),
        "points": POINTS,
        "overview": overview(results, anchors or {}),
    }


def overview(results: Results, anchors: Mapping[str, str]) -> Table:
    """Return the table of all tasks.

    Args:
        results: of the evaluation.
        anchors: places in a page by task.
    """
    headings = (
        Heading(text="task", is_number=False),
        Heading(text="metric", is_number=False, is_below=True),
        Heading(text="shots", is_below=True),
        Heading(text="chance"),
        Heading(text="this model"),
        Heading(text="interval", is_page_only=True),
        Heading(text="KOSMOS-1"),
        Heading(text="difference", is_page_only=True),
        Heading(text="samples"),
        Heading(text="failed"),
    )
    rows = []
    for task in results.tasks.values():
        ours, paper, top = main_value(task), reference(task), TOPS.get(task.main_metric, 100.0)
        rows.append(
            Row(
                cells=(
                    Cell(text=task.name, anchor=anchors.get(task.name, "")),
                    Cell(text=metric_label(task.main_metric)),
                    Cell(text=str(task.n_shots), alone=shots_label(task.n_shots)),
                    Cell(text=number(chance(task))),
                    metric_cell(ours, "ours", MISSING),
                    Cell(plot=Plot(metric=ours, chance=chance(task), paper=paper, top=top)),
                    Cell(text=number(paper)),
                    _difference(ours, paper),
                    Cell(text=f"{task.n_samples:,}"),
                    Cell(text=f"{task.n_failed:,}"),
                )
            )
        )
    return Table(headings=headings, rows=tuple(rows))


def _difference(ours: Metric | None, paper: float | None) -> Cell:
    """Return a cell with our value less the paper's, coloured if the paper's lies outside our interval."""
    # The last condition is NaN's: it equals nothing.
    if ours is None or paper is None or ours.value != ours.value:
        return Cell(text=MISSING)
    style, mark = ("good", " ▲") if ours.low > paper else ("bad", " ▼") if ours.high < paper else ("", "")
    return Cell(text=f"{signed(ours.value - paper)}{mark}", style=style)


def main_value(task: TaskResult) -> Metric | None:
    """Return the value of a task's main metric, in points; None if it was not measured."""
    return None if task.main_value is None else in_points(task.main_value)


def chance(task: TaskResult) -> float | None:
    """Return the score of guessing, in points."""
    return None if task.chance is None else 100 * task.chance
