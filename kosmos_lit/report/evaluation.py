"""Results on disk to a report that people read: `report.md` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from kosmos_lit.evaluation.results import Results, TaskResult, read_results
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.files import write_atomically
from kosmos_lit.report.cards import cards
from kosmos_lit.report.page import page, plot, section, wide
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
"""What a report says of an evaluation that did not show samples their own images."""
POINTS = "Points: 100 times a share, or times CIDEr; in brackets the 95 % interval of a bootstrap over samples."


TOPS = {"cider": 150.0, "cider_plain": 150.0}
"""Right ends of interval plots in points, where it is not 100."""
KEY = (  # of each plot the middle
    f'<p class="soft"><span class="key">{plot(Metric(50, 40, 60, 1), None, None)} measured, 95 % interval</span>'
    f'<span class="key">{plot(None, 50, None)} chance</span><span class="key">{plot(None, None, 50)} KOSMOS-1</span>'
    "▲ ▼ the published figure is outside of the interval; lines run from 0 to 100 points, CIDEr's to 150.</p>"
).replace('viewBox="0 0 176 18"', 'viewBox="61 0 54 18"')


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write `report.md` and `report.html` from a folder's `metrics.json` and `TASK/samples.jsonl`; return their paths.

    Args:
        folder: of the results.
        output: folder of the reports; None: the same.

    Raises: UserError if there are no results, or if a file is not what an evaluation writes.
    """
    results = read_results(folder)
    made = tables(results)
    pages = {"report.md": markdown_report(results, made), "report.html": html_report(results, made)}
    return [write((output or folder) / name, text) for name, text in pages.items()]


def write(path: Path, text: str) -> Path:
    """Write a text whole or not at all; return its path."""
    write_atomically(path, text.encode())
    return path


def title_of(results: Results) -> str:
    """Return what a report is headed: the checkpoint's name."""
    checkpoint = results.model.get("checkpoint")
    return f"Evaluation of {Path(str(checkpoint)).name}" if checkpoint else "Evaluation"


def model_facts(results: Results) -> dict[str, str]:
    """Return what is known of the evaluated model and of the evaluation, for people."""
    known = {**results.model, "machine": results.machine, "date": results.date}
    plain_values = {name: value for name, value in known.items() if value and isinstance(value, int | float | str)}
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in plain_values.items()}


def markdown_report(results: Results, made: list[Table]) -> str:
    """Return an evaluation's tables as Markdown."""
    facts = [f"- {plain(name)}: {plain(value)}" for name, value in model_facts(results).items()]
    control = CONTROLS.get(results.image_control, "")
    parts = [f"# {plain(title_of(results))}", "\n".join(facts), control, POINTS, _summary(results)]
    for table in made:
        parts += [f"## {plain(table.title)}", table.source and f"{table.source}.", _markdown(table)]
        parts.append("\n".join(f"- {plain(note)}" for note in table.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(results: Results) -> str:
    rows = []
    for task in results.tasks.values():
        best = headline(task)
        rows.append([
            task.name, metric_label(task.main_metric), str(task.n_shots), number(chance(task)),
            f"{number(best.value)} {interval(best)}".strip() if best else number(None), number(reference(task)),
            f"{task.n_samples:,}", f"{task.n_failed:,}",
        ])  # fmt: skip
    header = ["task", "measure", "shots", "chance", "this model", "KOSMOS-1", "samples", "failed"]
    return markdown(header, rows, left=2)


def _markdown(table: Table) -> str:
    header = ["model", *(column.label for column in table.columns)]
    rows = [[line.model if line.ours else _named(line), *_cells(table, line)] for line in table.lines]
    if table.chance is not None:
        rows.append(["chance", number(table.chance), *("" for _ in table.columns[1:])])
    return markdown(header, rows)


def _named(line: Line) -> str:
    return f"{line.model} ({line.note})" if line.note else line.model


def _cells(table: Table, line: Line) -> list[str]:
    found = [line.cells.get(column) for column in table.columns]
    return [f"{number(f.value)} {interval(f)}".strip() if f else "" for f in found]


def html_report(results: Results, made: list[Table]) -> str:
    """Return an evaluation's tables with chosen samples as one self-contained page."""
    anchors = {task.name: f"table-{i}" for i, table in enumerate(made) for task in table.tasks}
    parts = [_overview(results, anchors), f'<p class="soft">{escape(POINTS)}</p>']
    for i, table in enumerate(made):
        shown = [_samples(results, task, folded=number > 0) for number, task in enumerate(table.tasks)]
        parts.append(section(table, f"table-{i}", "\n".join(shown)))
    parts.append(
        '<footer class="soft">Of the failures, those that the model was surest of, or that score lowest, come first; '
        "the others are drawn by lot. All samples, with every prompt and answer, are in TASK/samples.jsonl.</footer>"
    )
    return page(title_of(results), model_facts(results), CONTROLS.get(results.image_control, ""), parts)


def _samples(results: Results, task: TaskResult, *, folded: bool) -> str:
    """Return a task's chosen samples; those of the same benchmark with more demonstrations are folded up."""
    choice = select_samples(results.samples(task.name), task.main_metric, seed=task.seed)
    made = cards(choice, results.image_control)
    return f"<details><summary>samples of {escape(task.name)}</summary>\n{made}</details>" if folded and made else made


def _overview(results: Results, anchors: Mapping[str, str]) -> str:
    """Return the table of all tasks, with their intervals drawn."""
    columns = ("this model", "", "chance", "KOSMOS-1", "difference", "samples", "failed")
    names = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = []
    for task in results.tasks.values():
        best, paper = headline(task), reference(task)
        failed = f"{task.n_failed:,}" if task.n_failed else ""
        value = f'<b class="ours">{number(best.value)}</b><small>{interval(best)}</small>' if best else number(None)
        asked = f"{metric_label(task.main_metric)}, {shots_label(task.n_shots)}"
        top = TOPS.get(task.main_metric, 100.0)
        rows.append(
            f'<tr><th scope="row"><a href="#{anchors[task.name]}">{escape(task.name)}</a><small>{escape(asked)}</small></th>'
            f"<td>{value}</td><td>{plot(best, chance(task), paper, top)}</td>"
            f"<td>{number(chance(task))}</td><td>{number(paper)}</td>"
            f"{_difference(best, paper)}<td>{task.n_samples:,}</td><td>{failed}</td></tr>"
        )
    return wide(f'<tr><th scope="col">task</th>{names}</tr>', rows) + KEY


def _difference(ours: Metric | None, paper: float | None) -> str:
    """Return how far ours is from the paper's, coloured where that lies beyond our interval."""
    if ours is None or paper is None or ours.value != ours.value:
        return f"<td>{number(None)}</td>"
    beyond, mark = ("good", " ▲") if ours.low > paper else ("bad", " ▼") if ours.high < paper else ("", "")
    return f'<td class="difference {beyond}">{signed(ours.value - paper)}{mark}</td>'


def headline(task: TaskResult) -> Metric | None:
    """Return the figure that stands for a task, in points; None if it was not measured."""
    return None if task.main_value is None else in_points(task.main_value)


def chance(task: TaskResult) -> float | None:
    """Return what guessing gets, in points."""
    return None if task.chance is None else 100 * task.chance
