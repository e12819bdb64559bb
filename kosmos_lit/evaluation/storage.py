"""Results on disk: a line a sample as soon as it is known, so that an interrupted evaluation goes on where it was.

    FOLDER/fingerprint.json            which weights, tokenizer and way of asking the results are of
    FOLDER/TASK/fingerprint.json       the task's class and options
    FOLDER/TASK/samples.jsonl       all results, in the samples' order
    FOLDER/TASK/samples.N.part      those of a process that still runs, or was stopped
    FOLDER/metrics.json             what they sum up to

A line that was cut off in the middle is not there. What went wrong is asked again when an evaluation goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.record import Result

FINGERPRINT, SAMPLES, METRICS = "fingerprint.json", "samples.jsonl", "metrics.json"


class Store:
    """The results of one task."""

    def __init__(self, folder: Path) -> None:
        """Take the task's folder."""
        self.folder = folder
        self.path = folder / SAMPLES

    def gather(self, order: Sequence[str] = ()) -> set[str]:
        """Bring all lines into one file, in the order of the samples' keys; return the keys that need not be asked again.

        For one process, while no other one writes.
        """
        parts = sorted(self.folder.glob("samples.*.part"))
        lines: dict[str, bytes] = {}
        done = set()
        for path in (self.path, *parts):
            for line in _lines(path):
                found = json.loads(line)
                key = found["key"]
                if found["error"] is None:
                    done.add(key)
                elif key in done:
                    continue
                lines[key] = line
        places = {key: place for place, key in enumerate(order)}
        keys = sorted(lines, key=lambda key: places.get(key, len(places)))
        if parts or keys != list(lines):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, b"".join(lines[key] for key in keys))
        for path in parts:
            path.unlink()
        return done

    def writer(self, rank: int) -> Writer:
        """Return what takes the results of one process."""
        return Writer(self.folder / f"samples.{rank}.part")

    def results(self) -> Iterator[Result]:
        """Yield all results of the one file, without what was asked."""
        for line in _lines(self.path):
            yield Result.from_dict(json.loads(line) | {"requests": []})

    def rescore(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Put other scores into the one file, by the samples' keys; for one process."""
        if not scores:
            return
        rows = (json.loads(line) for line in _lines(self.path))
        changed = (row | {"scores": dict(scores[row["key"]])} if row["key"] in scores else row for row in rows)
        write_whole(self.path, b"".join(_line(row) for row in changed))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


class Writer:
    """Appends results, and has handed them to the system when it returns: they outlive the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def write(self, results: Iterable[Result]) -> None:
        """Append results."""
        for result in results:
            self._file.write(_line(result.to_dict()))
        self._file.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[bytes]:
    """Yield whole lines; the last one may have been cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def check_fingerprint(folder: Path, identity: Mapping[str, Any], *, replace: bool = False) -> None:
    """Make sure that results in a folder are of what is evaluated now, and say so there.

    Args:
        folder: of an evaluation, or of a task in it.
        identity: plain data; what begins with an underscore is said, and may differ.
        replace: delete results of something else.

    Raises: UserError naming each value that differs.
    """
    path = folder / FINGERPRINT
    now = json.loads(json.dumps(identity, default=str))
    if path.is_file():
        there = _read(path)
        names = [name for name in {**there, **now} if not name.startswith("_") and there.get(name) != now.get(name)]
        if names and not replace:
            wrong = "; ".join(f"{name} {there.get(name)!r} there, {now.get(name)!r} here" for name in names)
            raise UserError(
                f"{folder} holds results of another evaluation: {wrong}. Give this one another --eval.folder, or delete it"
            )
        if names:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=1, ensure_ascii=False).encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return what `metrics.json` says, nothing if it is not there."""
    path = folder / METRICS
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder, or give another --eval.folder") from error
    return found


def without_nan(value: Any) -> Any:
    """Return plain data with None for every number that is not defined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
