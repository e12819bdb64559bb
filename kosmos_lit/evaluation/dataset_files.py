"""A dataset's files: whether they are there, and what is in them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError


def need(title: str, folder: Path, files: Sequence[str | Sequence[str]], source: str) -> list[Path]:
    """Return the files of a dataset, for each of `files` the first that is there.

    Args:
        title: the task's.
        folder: where the user has the dataset.
        files: names under it, a folder's with `/` behind it; a list of names: any of them; `*` stands for anything.
        source: the page where the authors publish them.

    Raises: UserError saying which are missing, what is expected, and where it is published.
    """
    names = [[name] if isinstance(name, str) else list(name) for name in files]
    found = [_first(folder, alternatives) for alternatives in names]
    wanted = [" or ".join(alternatives) for alternatives in names]
    missing = [name for name, path in zip(wanted, found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{title}: no {', no '.join(missing)} under {folder}; the task reads {', '.join(wanted)} there, "
            f"as its authors publish them: {source}"
        )
    return [path for path in found if path is not None]


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        for path in sorted(folder.glob(name.rstrip("/"))) if "*" in name else [folder / name]:
            if path.is_dir() if name.endswith("/") else path.is_file():
                return path
    return None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises: UserError if it is none.
    """
    with expecting(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path, fields: Sequence[str] = ()) -> list[Any]:
    """Read a file of one JSON value a line; empty lines do not count.

    Args:
        path: the file.
        fields: what each value, an object, must have.

    Raises: UserError if it is none, or naming the value that lacks a field.
    """
    with expecting(path):
        lines = path.read_text(encoding="utf-8").split("\n")  # no other character ends a line of JSON
        return _complete([json.loads(line) for line in lines if line.strip()], fields, path)


def read_table(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read a CSV file with a header, one object a row; a name in `.tsv` says that tabs stand between columns.

    Raises: UserError if it is none, or naming the row that lacks one of the columns.
    """
    with expecting(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return _complete(rows, fields, path)


def read_lines(path: Path) -> list[str]:
    """Read a text file's lines.

    Raises: UserError if it is no UTF-8.
    """
    with expecting(path):
        return path.read_text(encoding="utf-8").splitlines()


def read_labels(path: Path, n: int) -> list[str]:
    """Read a file of one label a line.

    Raises: UserError if there are not n of them.
    """
    with expecting(path):
        labels = path.read_text(encoding="utf-8").split()
    if len(labels) != n:
        raise UserError(f"{path}: {len(labels)} labels for {n} samples; both files must be of one release")
    return labels


def _complete(rows: list[Any], fields: Sequence[str], path: Path) -> list[Any]:
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in fields if row.get(name) is None]:
            raise UserError(f"{path}: no {', '.join(missing)} in sample {number}; take the file as its authors publish it")
    return rows


@contextmanager
def expecting(path: Path) -> Iterator[None]:
    """Turn what goes wrong when a file is not as its authors' are into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError) as error:  # XML's is the last
        raise UserError(f"{path} is not as its authors publish it: {type(error).__name__}: {error}") from error
