"""A dataset's files: find them, read them, and name the file in every error."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError


def require_files(title: str, folder: Path, names: Sequence[str | Sequence[str]], source: str) -> list[Path]:
    """Return the paths of a dataset's files, for each of `names` the first that exists.

    Args:
        title: the task's.
        folder: the user's folder of the dataset.
        names: names under the folder, a folder's with `/` at its end; a list of names: any of them; `*` matches anything.
        source: the page where the authors publish the files.

    Raises: UserError naming the missing files, all that are expected, and the source.
    """
    alternatives = [[name] if isinstance(name, str) else list(name) for name in names]
    paths = [_first_existing(folder, each) for each in alternatives]
    expected = [" or ".join(each) for each in alternatives]
    if missing := [name for name, path in zip(expected, paths, strict=True) if path is None]:
        raise UserError(
            f"{title}: no {', no '.join(missing)} under {folder}; the task reads {', '.join(expected)} from that folder, "
            f"as its authors publish them: {source}"
        )
    return [path for path in paths if path is not None]  # none is None; the filter is for mypy


def _first_existing(folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        # Sorted: glob yields files in the file system's order.
        for path in sorted(folder.glob(name.rstrip("/"))) if "*" in name else [folder / name]:
            if path.is_dir() if name.endswith("/") else path.is_file():
                return path
    return None


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises: UserError if the file is not JSON.
    """
    with parsing(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path, fields: Sequence[str] = ()) -> list[Any]:
    """Return the values of a file with one JSON value a line; empty lines do not count.

    Args:
        path: the file.
        fields: keys that each value, an object, must have.

    Raises: UserError if a line is not JSON, or naming the value that lacks a field.
    """
    with parsing(path):
        # Not splitlines(): JSON strings may contain U+2028 and other line separators.
        lines = path.read_text(encoding="utf-8").split("\n")
        return _complete([json.loads(line) for line in lines if line.strip()], fields, path)


def read_csv(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with a header as objects; columns of a `.tsv` are separated by tabs.

    Raises: UserError if the file is not CSV, or naming the row that lacks one of the columns.
    """
    # utf-8-sig: some of these files begin with a byte order mark, which would become part of the first column's name.
    with parsing(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return _complete(rows, fields, path)


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines.

    Raises: UserError if the file is not UTF-8.
    """
    with parsing(path):
        return path.read_text(encoding="utf-8").splitlines()


def read_labels(path: Path, n: int) -> list[str]:
    """Return the labels of a file with one a line.

    Raises: UserError if the file does not have n labels.
    """
    with parsing(path):
        labels = path.read_text(encoding="utf-8").split()
    if len(labels) != n:
        raise UserError(f"{path}: {len(labels)} labels for {n} samples; both files must be of one release")
    return labels


def _complete(rows: list[Any], fields: Sequence[str], path: Path) -> list[Any]:
    for number, row in enumerate(rows, start=1):
        # None too: DictReader fills the missing columns of a short row with it.
        if missing := [name for name in fields if row.get(name) is None]:
            raise UserError(f"{path}: no {', '.join(missing)} in sample {number}; take the file as its authors publish it")
    return rows


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn errors of reading and parsing a file into a UserError that names the file."""
    try:
        yield
    except UserError:
        # Raised by an inner reader, which has named its file already.
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        SyntaxError,
    ) as error:  # XML's errors are SyntaxError
        raise UserError(f"{path} is not as its authors publish it: {type(error).__name__}: {error}") from error
