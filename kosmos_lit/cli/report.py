"""The verb `report eval`: results of evaluations to tables for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalReportOptions:
    """What is compared."""

    folders: tuple[Path, ...]
    names: str | None = None
    """Names of the evaluations, with commas between them; None: the ends of their paths."""
    output: Path | None = None
    """Folder to write; None: the first one."""


def eval_parser() -> Parser:
    """Return the options of `report eval`."""
    return verb_parser(
        "report eval",
        EvalReportOptions,
        positionals={"folders": ("+", "results of `test`, by default in RUN/eval")},
        description="Print the metrics of evaluations. For one folder, report.md and report.html are written; several are "
        "compared, by paired differences of the first to each other one, in comparison.md, .html and .json.",
    )


def report_eval(arguments: list[str]) -> None:
    """Print the metrics of evaluations and write their report, or the comparison of several."""
    [a] = eval_parser().read(arguments)
    from kosmos_lit.evaluation.results import read_results
    from kosmos_lit.report.comparison import compare, comparison_html, comparison_markdown
    from kosmos_lit.report.evaluation import write_report, write_texts

    names = None if a.names is None else [name.strip() for name in a.names.split(",")]
    if names is not None and not all(names):
        raise UserError(f"report eval: --names {a.names!r} has an empty name")
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
