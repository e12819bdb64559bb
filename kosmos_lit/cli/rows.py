"""The verb `rows`: what the model gets at given rows of the stream."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError


def rows_parser() -> argparse.ArgumentParser:
    """Return the options of `rows`; those of `fit` are taken beside them."""
    parser = Parser(prog="main.py rows", epilog="All other arguments are those of fit: -c CONFIG, overrides.")
    parser.add_argument("--start", type=int, default=None, help="first row; by default 0")
    parser.add_argument("--count", type=int, default=None, help="number of rows; by default 1")
    parser.add_argument("--step", type=int, default=None, help="the rows of this optimizer step, the first being 1")
    parser.add_argument(
        "--ckpt_path", type=Path, default=None, help="checkpoint of a run whose mixture was changed on a resume"
    )
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def rows(arguments: list[str]) -> None:
    """Print rows of a run's stream."""
    a, run_arguments = rows_parser().parse_known_args(arguments)
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
    from kosmos_lit.cli.trainer import DataCLI, user_errors

    with user_errors(run_arguments):
        data = DataCLI(run_arguments).datamodule
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
