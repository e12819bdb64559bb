"""An evaluation's results as a report for people: `report.md` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from kosmos_lit.evaluation.results import Results, TaskResult, read_results
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.files import write_atomically
from kosmos_lit.report.cards import cards
from kosmos_lit.report.page import page, plot, scrolling_table, section
from kosmos_lit.report.samples import select_samples
from kosmos_lit.report.tables import (
    Line,
    Table,
    in_points,
    interval,
    markdown,
    metric_label,
    number,
    plain,
    reference,
    shots_label,
    signed,
    tables,
)

CONTROLS: Mapping[str, str] = {
    "shuffled": "Control: every sample is shown another sample's images.",
    "blank": "Control: even grey stands in the place of every image.",
    "none": "Control: no images are shown.",
}
"""Banners of reports on image controls."""
POINTS = "Points: 100 times a share, or times CIDEr; in brackets the 95 % interval of a bootstrap over samples."
TOPS = {"cider": 150.0, "cider_plain": 150.0}
"""Right ends of interval plots in points, by metric; 100 for all others."""
KEY = (  # small plots, cut out of the middle of full ones
    f'<p class="soft"><span class="key">{plot(Metric(50, 40, 60, 1), None, None)} measured, 95 % interval</span>'
    f'<span class="key">{plot(None, 50, None)} chance</span><span class="key">{plot(None, None, 50)} KOSMOS-1</span>'
    "▲ ▼ the published value is outside of the interval; lines run from 0 to 100 points, CIDEr's to 150.</p>"
).replace('viewBox="0 0 176 18"', 'viewBox="61 0 54 18"')


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write `report.md` and `report.html` from a folder's `metrics.json` and `TASK/samples.jsonl`; return their paths.

    Args:
        folder: of the results.
        output: folder of the reports; None: the same.

    Raises: UserError if there are no results, or if a file is not what an evaluation writes.
    """
    results = read_results(folder)
    benchmarks = tables(results)
    texts = {"report.md": markdown_report(results, benchmarks), "report.html": html_report(results, benchmarks)}
    return write_texts(output or folder, texts)


def write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write text files by name into a folder; return their paths."""
    paths = {folder / name: text for name, text in texts.items()}
    for path, text in paths.items():
        write_atomically(path, text.encode())
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


def markdown_report(results: Results, benchmarks: list[Table]) -> str:
    """Return an evaluation's tables as Markdown."""
    facts = [f"- {plain(name)}: {plain(value)}" for name, value in model_facts(results).items()]
    control = CONTROLS.get(results.image_control, "")
    parts = [f"# {plain(title_of(results))}", "\n".join(facts), control, POINTS, _summary(results)]
    for table in benchmarks:
        # An empty source stays empty, and is left out below.
        parts += [f"## {plain(table.title)}", table.source and f"{table.source}.", _markdown(table)]
        parts.append("\n".join(f"- {plain(note)}" for note in table.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(results: Results) -> str:
    rows = []
    for task in results.tasks.values():
        value = main_value(task)
        rows.append([
            task.name, metric_label(task.main_metric), str(task.n_shots), number(chance(task)),
            f"{number(value.value)} {interval(value)}".strip() if value else number(None), number(reference(task)),
            f"{task.n_samples:,}", f"{task.n_failed:,}",
        ])  # fmt: skip
    header = ["task", "metric", "shots", "chance", "this model", "KOSMOS-1", "samples", "failed"]
    return markdown(header, rows, left=2)


def _markdown(table: Table) -> str:
    header = ["model", *(column.label for column in table.columns)]
    rows = [[line.model if line.ours else _model_name(line), *_cells(table, line)] for line in table.lines]
    if table.chance is not None:
        # One value for the task, whatever the column.
        rows.append(["chance", number(table.chance), *("" for _ in table.columns[1:])])
    return markdown(header, rows)


def _model_name(line: Line) -> str:
    return f"{line.model} ({line.note})" if line.note else line.model


def _cells(table: Table, line: Line) -> list[str]:
    metrics = [line.cells.get(column) for column in table.columns]
    return [f"{number(m.value)} {interval(m)}".strip() if m else "" for m in metrics]


def html_report(results: Results, benchmarks: list[Table]) -> str:
    """Return an evaluation's tables with selected samples as one self-contained page."""
    anchors = {task.name: f"table-{i}" for i, table in enumerate(benchmarks) for task in table.tasks}
    parts = [_overview(results, anchors), f'<p class="soft">{escape(POINTS)}</p>']
    for i, table in enumerate(benchmarks):
        # The first task's samples are visible, those of its variants folded.
        samples = [_samples(results, task, folded=n > 0) for n, task in enumerate(table.tasks)]
        parts.append(section(table, f"table-{i}", "\n".join(samples)))
    parts.append(
        '<footer class="soft">Failures of the highest confidence, or of the lowest score, come first; '
        "the others are random. All samples, with every prompt and prediction, are in TASK/samples.jsonl.</footer>"
    )
    return page(title_of(results), model_facts(results), CONTROLS.get(results.image_control, ""), parts)


def _samples(results: Results, task: TaskResult, *, folded: bool) -> str:
    """Return a task's selected samples, folded up if so asked."""
    selection = select_samples(results.samples(task.name), task.main_metric, seed=task.seed)
    html = cards(selection, results.image_control)
    return f"<details><summary>samples of {escape(task.name)}</summary>\n{html}</details>" if folded and html else html


def _overview(results: Results, anchors: Mapping[str, str]) -> str:
    """Return the table of all tasks with plots of their intervals."""
    columns = ("this model", "", "chance", "KOSMOS-1", "difference", "samples", "failed")
    names = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = []
    for task in results.tasks.values():
        ours, paper = main_value(task), reference(task)
        failed = f"{task.n_failed:,}" if task.n_failed else ""
        value = f'<b class="ours">{number(ours.value)}</b><small>{interval(ours)}</small>' if ours else number(None)
        label = f"{metric_label(task.main_metric)}, {shots_label(task.n_shots)}"
        top = TOPS.get(task.main_metric, 100.0)
        rows.append(
            f'<tr><th scope="row"><a href="#{anchors[task.name]}">{escape(task.name)}</a><small>{escape(label)}</small></th>'
            f"<td>{value}</td><td>{plot(ours, chance(task), paper, top)}</td>"
            f"<td>{number(chance(task))}</td><td>{number(paper)}</td>"
            f"{_difference(ours, paper)}<td>{task.n_samples:,}</td><td>{failed}</td></tr>"
        )
    return scrolling_table(f'<tr><th scope="col">task</th>{names}</tr>', rows) + KEY


def _difference(ours: Metric | None, paper: float | None) -> str:
    """Return a cell with our value less the paper's, coloured if the paper's lies outside our interval."""
    # The last condition is NaN's: it equals nothing.
    if ours is None or paper is None or ours.value != ours.value:
        return f"<td>{number(None)}</td>"
    colour, mark = ("good", " ▲") if ours.low > paper else ("bad", " ▼") if ours.high < paper else ("", "")
    return f'<td class="difference {colour}">{signed(ours.value - paper)}{mark}</td>'


def main_value(task: TaskResult) -> Metric | None:
    """Return the value of a task's main metric, in points; None if it was not measured."""
    return None if task.main_value is None else in_points(task.main_value)


def chance(task: TaskResult) -> float | None:
    """Return the score of guessing, in points."""
    return None if task.chance is None else 100 * task.chance
