"""Results on disk while an evaluation runs: one line a sample as soon as it is known, so that a restart continues.

    FOLDER/fingerprint.json         weights, tokenizer and image control of the results
    FOLDER/TASK/fingerprint.json    the task's class and options
    FOLDER/TASK/samples.jsonl       all results, in the samples' order
    FOLDER/TASK/samples.N.part      those of a process that still runs, or was stopped
    FOLDER/metrics.json             the metrics of all tasks

A line that was cut off is ignored. Failed samples are evaluated again when an evaluation continues.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.results import (
    METRICS,
    SAMPLES,
    Result,
    check_version,
    is_of_earlier_version,
    iterate_samples,
    parse_sample,
    sample_lines,
)
from kosmos_lit.files import write_atomically
from kosmos_lit.model import Kosmos

FINGERPRINT = "fingerprint.json"


class Store:
    """The results of one task."""

    def __init__(self, folder: Path) -> None:
        """Take the task's folder."""
        self.folder = folder
        self.path = folder / SAMPLES

    def gather(self, order: Sequence[str] = ()) -> set[str]:
        """Merge the files of all processes into one, in the order of keys; return the keys of samples with an outcome.

        For one process, while no other one writes.
        """
        parts = sorted(self.folder.glob("samples.*.part"))
        lines: dict[str, bytes] = {}
        done = set()
        # Parts are newer than the merged file: of two lines with one key the later counts.
        for path in (self.path, *parts):
            for number, _, line in sample_lines(path):
                sample = parse_sample(path, number, line)
                key = sample["key"]
                if sample["error"] is None:
                    done.add(key)
                elif key in done:  # a later failure does not replace an outcome
                    continue
                lines[key] = line
        places = {key: place for place, key in enumerate(order)}
        # Samples outside of `order` stay, behind the others.
        keys = sorted(lines, key=lambda key: places.get(key, len(places)))
        # A merged file that is in order already is left as it is.
        if parts or keys != list(lines):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, b"".join(lines[key] for key in keys))
        for path in parts:  # after the merged file is on disk, so that a crash in between loses nothing
            path.unlink()
        return done

    def writer(self, rank: int) -> Writer:
        """Return the writer of one process's results."""
        return Writer(self.folder / f"samples.{rank}.part")

    def results(self) -> Iterator[Result]:
        """Yield all results of the merged file, without their requests."""
        for _, sample in iterate_samples(self.path):
            yield Result.from_dict(sample | {"requests": []})

    def rescore(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Replace scores in the merged file, by the samples' keys; for one process."""
        if not scores:
            return
        rows = (sample for _, sample in iterate_samples(self.path))
        changed = (row | {"scores": dict(scores[row["key"]])} if row["key"] in scores else row for row in rows)
        write_atomically(self.path, b"".join(_line(row) for row in changed))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


class Writer:
    """Appends results; they outlive the process once `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Overwrites the part of an earlier start, which `gather` has merged.
        self._file = path.open("wb")

    def write(self, results: Iterable[Result]) -> None:
        """Append results."""
        for result in results:
            self._file.write(_line(result.to_dict()))
        self._file.flush()  # to the system, which a killed process does not take along

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# ---- fingerprints


def check_fingerprint(folder: Path, fingerprint: Mapping[str, Any], *, replace: bool = False) -> None:
    """Check that the results in a folder have a fingerprint, and write it to an empty folder.

    Args:
        folder: of an evaluation, or of a task in it.
        fingerprint: plain data; values whose names begin with an underscore are recorded but may differ.
        replace: delete results with another fingerprint.

    Raises: UserError naming each value that differs.
    """
    path = folder / FINGERPRINT
    if replace and is_of_earlier_version(folder):
        shutil.rmtree(folder)
    check_version(folder)
    # As it reads back from the file: tuples become lists, paths text.
    actual = json.loads(json.dumps(fingerprint, default=str))
    if path.is_file():
        stored = _read(path)
        # A merged dict, not a set of keys: the message lists them in the same order each time.
        names = [name for name in {**stored, **actual} if not name.startswith("_") and stored.get(name) != actual.get(name)]
        if names and not replace:
            differences = "; ".join(
                f"{name} is {stored.get(name)!r} in the folder, {actual.get(name)!r} in this run" for name in names
            )
            raise UserError(
                f"{folder} holds results of another evaluation: {differences}. Give this run another --eval.folder, or "
                "delete the folder"
            )
        if names:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(actual, indent=1, ensure_ascii=False).encode())


def weights_digest(model: Kosmos) -> str:
    """Return a digest of a model's weights, whatever file they came from: sums of bits, equal on every device."""
    total = 0
    for name, tensor in sorted(model.state_dict().items()):
        # Bits as integers: their sum does not depend on the order of additions, as a sum of floats does.
        flat = tensor.detach().contiguous().view(-1)
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        factor = _odd_hash(name + str(tuple(tensor.shape)))
        # Odd factors are invertible modulo 2 ** 64, so that a changed sum always changes its term.
        total += factor * (1 + 2 * int(flat.view(ints).sum(dtype=torch.int64)))
    return f"{total % (1 << 64):016x}"


def _odd_hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") | 1


# ---- metrics


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the contents of `metrics.json`, empty if there is no such file."""
    path = folder / METRICS
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder, or give another --eval.folder") from error
    return data
