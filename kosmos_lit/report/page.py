"""Reports as one HTML file without scripts or external files, in which all texts of datasets and models are escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.report.style import STYLE
from kosmos_lit.report.tables import Line, Table, interval, metric_label, number, shots_label

PLOT = 176, 18
"""Width and height of an interval plot, in pixels."""


def page(title: str, facts: Mapping[str, str], banner: str, parts: Iterable[str]) -> str:
    """Return a whole page."""
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f'<header><h1>{escape(title)}</h1>\n<dl class="facts">{rows}</dl></header>',
        f'<p class="banner">{escape(banner)}</p>' if banner else "",
        *parts,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(line for line in lines if line)


def section(table: Table, anchor: str, samples: str) -> str:
    """Return a benchmark as HTML: its table, notes and samples."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    source = f'<p class="source">{escape(table.source)}</p>' if table.source else ""
    return (
        f'<section id="{escape(anchor)}">\n<h2>{escape(table.title)}</h2>{source}\n{benchmark(table)}\n'
        f'<ul class="notes">{notes}</ul>\n{samples}\n</section>'
    )


def benchmark(table: Table) -> str:
    """Return a benchmark's table: metrics above numbers of shots."""
    # groupby joins neighbours only; the columns are sorted by metric.
    groups = [(name, list(columns)) for name, columns in groupby(table.columns, key=lambda column: column.metric)]
    metrics = "".join(f'<th scope="colgroup" colspan="{len(c)}">{escape(metric_label(n))}</th>' for n, c in groups)
    shots = "".join(f'<th scope="col">{escape(shots_label(column.shots))}</th>' for column in table.columns)
    head = f'<tr><th rowspan="2" scope="col">model</th>{metrics}</tr>\n<tr>{shots}</tr>'
    rows = [_row(line, [cell(line.cells.get(c), line.ours) for c in table.columns]) for line in table.lines]
    if table.chance is not None:
        # One value for the task, whatever the column.
        cells = f"<td>{number(table.chance)}</td>" + "<td></td>" * (len(table.columns) - 1)
        rows.append(f'<tr class="chance"><th scope="row">chance</th>{cells}</tr>')
    return scrolling_table(head, rows)


def _row(line: Line, cells: Sequence[str]) -> str:
    note = f"<small>{escape(line.note)}</small>" if line.note else ""
    ours = ' class="ours"' if line.ours else ""
    return f'<tr{ours}><th scope="row">{escape(line.model)}{note}</th>{"".join(cells)}</tr>'


def cell(metric: Metric | None, strong: bool = False) -> str:
    """Return a cell with a metric in points, its interval below it."""
    if metric is None:
        return "<td></td>"
    value = f"<b>{number(metric.value)}</b>" if strong else number(metric.value)
    interval_text = interval(metric)
    return f"<td>{value}{f'<small>{interval_text}</small>' if interval_text else ''}</td>"


def scrolling_table(head: str, rows: Iterable[str]) -> str:
    """Return a table that scrolls by itself on a narrow screen."""
    body = "\n".join(rows)
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def plot(metric: Metric | None, chance: float | None, paper: float | None, top: float = 100.0) -> str:
    """Return an interval as an SVG image, on a line from 0 to `top` points.

    Args:
        metric: in points; a dot with whiskers.
        chance: in points; a dotted tick.
        paper: in points; an open diamond.
        top: right end of the line.
    """
    width, height = PLOT
    middle = height / 2

    def x(points: float) -> float:
        # 6 pixels at each end leave room for a whole diamond. Clamped: CIDEr and intervals may lie outside of the line.
        return 6 + (width - 12) * min(max(points, 0.0), top) / top

    shapes = [f'<line class="track" x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}"/>']
    label = []
    if chance is not None and not math.isnan(chance):
        shapes.append(f'<line class="chance" x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="1" y2="{height - 1}"/>')
        label.append(f"chance {number(chance)}")
    if metric is not None and not math.isnan(metric.value):
        if interval(metric):
            ends = f'x1="{x(metric.low):.1f}" x2="{x(metric.high):.1f}"'
            shapes.append(f'<line class="whisker" {ends} y1="{middle}" y2="{middle}"/>')
        shapes.append(f'<circle class="value" cx="{x(metric.value):.1f}" cy="{middle}" r="3.5"/>')
        label.append(f"measured {number(metric.value)} {interval(metric)}".strip())
    if paper is not None:
        at = x(paper)
        corners = f"{at:.1f},{middle - 5} {at + 5:.1f},{middle} {at:.1f},{middle + 5} {at - 5:.1f},{middle}"
        shapes.append(f'<polygon class="paper" points="{corners}"/>')
        label.append(f"KOSMOS-1 {number(paper)}")
    text = escape("; ".join(label) or "nothing measured")
    return f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{text}">{"".join(shapes)}</svg>'
