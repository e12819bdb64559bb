"""The verb `rows`: what the model gets at given rows of the stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    """Which rows."""

    start: int | None = None
    """First row; None: 0."""
    count: int | None = None
    """Number of rows; None: 1."""
    step: int | None = None
    """The rows of this optimizer step, the first being 1."""
    ckpt_path: Path | None = None
    """Checkpoint of a run whose mixture was changed on a resume."""
    split: Literal["train", "val"] = "train"
    """Rows of training, or those held out."""
    json: bool = False
    """One JSON object a line."""


def rows_parser() -> Parser:
    """Return the options of `rows`; those of `fit` are taken beside them."""
    return verb_parser("rows", RowsOptions, epilog="All other arguments are those of fit: -c CONFIG, overrides.")


def rows(arguments: list[str]) -> None:
    """Print rows of a run's stream."""
    parser = rows_parser()
    a, run_arguments = parser.read_known(arguments)
    if a.step is not None and (a.split != "train" or a.start is not None or a.count is not None):
        raise UserError("rows: --step names all rows of a training step; leave out --start, --count and --split")
    # The options default to None, so that --step can refuse them.
    start, count = a.start or 0, 1 if a.count is None else a.count
    if start < 0 or count < 0:
        raise UserError(f"rows: --start {start} and --count {count} must not be negative")
    if a.step is not None and a.step < 1:
        raise UserError(f"rows: --step {a.step} must be at least 1, the first step")
    from datamodules.module import MixtureData
    from datamodules.row_display import describe_row, readable_row
    from kosmos_lit.cli.overlays import with_files_resolved
    from kosmos_lit.cli.trainer import DataCLI, user_errors

    run_arguments = with_files_resolved(run_arguments)
    with user_errors(run_arguments):
        data = DataCLI(run_arguments, beside=parser.option_names()).datamodule
    if not isinstance(data, MixtureData):
        raise UserError(f"rows: {type(data).__name__} has no rows")
    data.prepare_data()
    data.open()
    if a.ckpt_path is not None:
        from kosmos_lit.checkpoint import load_checkpoint

        # Lightning keeps the state of a data module under its class's name.
        data.restore_history(load_checkpoint(a.ckpt_path)[type(data).__qualname__])
    stream = data.stream(a.split)
    numbers = range(start, start + count) if a.step is None else data.steps.rows(a.step)
    if a.split == "val":
        # The training stream has no last row; held-out rows have.
        n_rows = data.n_val_rows()
        if start >= n_rows:
            raise UserError(f"rows: --start {start}, but there are {n_rows} held-out rows, from 0")
        numbers = numbers[: n_rows - start]
    for number in numbers:
        row, blocked = data.apply_blocklist(stream.row(number))
        if a.json:
            print(json.dumps(describe_row(row, stream, blocked)))
        else:
            print(readable_row(row, stream, data.tokenizer, blocked))
