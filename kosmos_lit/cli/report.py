"""The verb `report`: results of evaluations to tables for people."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError


def report_parser() -> argparse.ArgumentParser:
    """Return the options of `report`."""
    parser = Parser(
        prog="main.py report",
        description="Print the metrics of evaluations. For one folder, report.md and report.html are written; several are "
        "compared, by paired differences of the first to each other one, in comparison.md, .html and .json.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="results of `test`, by default in RUN/eval")
    parser.add_argument(
        "--names", default=None, metavar="A,B,...", help="names of the evaluations; by default the ends of their paths"
    )
    parser.add_argument("--output", type=Path, default=None, metavar="DIR", help="folder to write; by default the first one")
    return parser


def report(arguments: list[str]) -> None:
    """Print the metrics of evaluations and write their report, or the comparison of several."""
    a = report_parser().parse_args(arguments)
    from kosmos_lit.evaluation.results import read_results
    from kosmos_lit.report.comparison import compare, comparison_html, comparison_markdown
    from kosmos_lit.report.evaluation import write_report, write_texts

    names = None if a.names is None else [name.strip() for name in a.names.split(",")]
    if names is not None and not all(names):
        raise UserError(f"report: --names {a.names!r} has an empty name")
    # Of one evaluation, this is the table of its metrics.
    comparison = compare(a.folders, names)
    output = a.output or a.folders[0]
    print(comparison_markdown(comparison))
    if len(a.folders) == 1:
        paths = write_report(a.folders[0], output)
    else:
        texts = {
            "comparison.md": f"# Evaluations side by side\n\n{comparison_markdown(comparison)}",
            "comparison.html": comparison_html(comparison, [read_results(folder) for folder in a.folders]),
            "comparison.json": json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False),
        }
        paths = write_texts(output, texts)
    print(f"wrote {', '.join(str(path) for path in paths)}")
