"""Results of an evaluation on disk: a line of `TASK/samples.jsonl` for each sample, and `metrics.json`.

Keys of a line: key, requests (each with prompt, images, and candidates, log_probs or settings, prediction, ended),
prediction, target, scores, data, error. Keys of `metrics.json`: model, image_control, machine, date, and tasks by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.evaluation.task import Outcome
from kosmos_lit.terminal import program

SAMPLES, METRICS = "samples.jsonl", "metrics.json"
EARLIER_FILES = ("figures.json", "identity.json")
"""Names of files that earlier versions of this project wrote."""
EARLIER_KEYS = ("said", "right")
"""Keys of a sample's line in earlier versions."""
NAN = float("nan")


# ---- a sample


@dataclass(frozen=True)
class Failure:
    """Why a sample has no outcome."""

    reason: str
    """A short phrase for counting."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Result:
    """One sample's requests and responses, and its outcome or failure."""

    key: str
    requests: list[dict[str, Any]]
    """Plain data, in the order of `Task.ask`."""
    outcome: Outcome | None
    """None if it failed."""
    failure: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: one line of `samples.jsonl`."""
        # A failed sample has the same keys as any other.
        outcome = asdict(self.outcome) if self.outcome else {"prediction": None, "target": None, "scores": {}, "data": {}}
        return {"key": self.key, "requests": self.requests, **outcome, "error": str(self.failure) if self.failure else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Return the result that `to_dict` made plain data of."""
        outcome = {name: data[name] for name in ("prediction", "target", "scores", "data")}
        if data["error"] is None:
            return cls(data["key"], data["requests"], Outcome(**outcome))
        reason, _, detail = data["error"].partition(": ")  # no reason has a colon
        return cls(data["key"], data["requests"], None, Failure(reason, detail))


def sample_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the lines of a file of samples with their numbers from 1 on and their positions in bytes.

    A last line that an interruption cut off is left out: its sample is evaluated again when the evaluation continues.
    """
    if not path.is_file():
        return
    # Counted in bytes, as `sample_at` seeks; positions in text mode are opaque numbers.
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, position, line
            position += len(line)


def parse_sample(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the sample of a line.

    Raises: UserError naming the line if it is not a sample, or one of an earlier version.
    """
    try:
        sample = json.loads(line)
    except ValueError as error:
        # JSON's errors are ValueErrors, and so are bytes that are not UTF-8.
        raise UserError(f"{path}, line {number}: not a sample: {error}; remove the line to evaluate it again") from error
    if not isinstance(sample, dict) or "key" not in sample:
        raise UserError(f"{path}, line {number}: not a sample: it has no key; remove the line to evaluate it again")
    if any(key in sample for key in EARLIER_KEYS):
        raise earlier_version_error(path.parent)
    return sample


def iterate_samples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every sample of a file with the position of its line in bytes; one sample is in memory at a time.

    Raises: UserError naming a line that is not a sample.
    """
    return ((position, parse_sample(path, number, line)) for number, position, line in sample_lines(path))


def sample_at(path: Path, position: int) -> dict[str, Any]:
    """Return the sample whose line begins at a position in bytes."""
    with path.open("rb") as file:
        file.seek(position)
        # Line 0: the number is not known after a seek, and the line has been parsed before.
        return parse_sample(path, 0, file.readline())


# ---- all samples


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The metrics of one task."""

    name: str
    """Its name in the configuration."""
    title: str
    published: str | None
    """Key in `report/published.yaml`."""
    main_metric: str
    """Name of the metric that stands for the task."""
    chance: float | None
    """Accuracy of guessing."""
    n_shots: int
    seed: int
    n_samples: int
    """Evaluated samples, failed ones among them."""
    n_failed: int
    """Samples without an outcome (an unreadable image, a prompt that is too long); no metric counts them."""
    failures: Mapping[str, int]
    """Failed samples by reason."""
    options: Mapping[str, Any]
    metrics: Mapping[str, Metric]

    @property
    def main_value(self) -> Metric | None:
        """The main metric; None if it was not computed."""
        return self.metrics.get(self.main_metric)


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation."""

    folder: Path
    model: Mapping[str, Any]
    """Checkpoint, step, number of parameters and other facts."""
    image_control: str
    """`true`, or the control in its place."""
    machine: str
    date: str
    tasks: Mapping[str, TaskResult]

    def samples(self, task: str) -> Path:
        """Return the file with a task's samples."""
        return self.folder / task / SAMPLES


def read_results(folder: Path) -> Results:
    """Return the metrics of an evaluation.

    Raises: UserError if the folder has none, or its file is not of an evaluation.
    """
    path = folder / METRICS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of results")
    check_version(folder)
    if not path.is_file():
        raise UserError(f"{folder}: no {METRICS}; `{program()} test` with eval.tasks writes it, by default in RUN/eval")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tasks = {name: _task_result(name, task) for name, task in data["tasks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The last two: JSON of another shape, such as a list in the place of an object.
        raise UserError(f"{path}: not the metrics of an evaluation ({type(error).__name__}: {error})") from error
    if not tasks:
        raise UserError(f"{path}: no tasks; nothing was evaluated")
    return Results(
        folder=folder,
        model=data.get("model") or {},
        image_control=str(data.get("image_control", "true")),
        machine=str(data.get("machine") or ""),
        date=str(data.get("date") or ""),
        tasks=tasks,
    )


def _task_result(name: str, entry: Mapping[str, Any]) -> TaskResult:
    metrics = {
        metric: Metric(_number(f["value"]), _number(f["low"]), _number(f["high"]), int(f["n"]))
        for metric, f in entry["metrics"].items()
    }
    return TaskResult(
        name=name,
        title=entry["title"],
        published=entry.get("published"),
        main_metric=entry["main_metric"],
        chance=entry.get("chance"),
        n_shots=entry.get("n_shots", 0),
        seed=entry.get("seed", 0),
        n_samples=entry["n_samples"],
        n_failed=entry.get("n_failed", 0),
        failures=entry.get("failures") or {},
        options=entry.get("options") or {},
        metrics=metrics,
    )


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)  # `without_nan` has written null


def without_nan(value: Any) -> Any:
    """Return plain data with None for every number that is not defined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- earlier versions


def is_of_earlier_version(folder: Path) -> bool:
    """Return whether an earlier version of this project wrote the results of an evaluation or a task in a folder."""
    return any((folder / name).is_file() for name in EARLIER_FILES)


def check_version(folder: Path) -> None:
    """Raises: UserError if the results in a folder are of an earlier version."""
    if is_of_earlier_version(folder):
        raise earlier_version_error(folder)


def earlier_version_error(folder: Path) -> UserError:
    """Return the message about results of an earlier version in a folder."""
    return UserError(
        f"{folder} holds results of an earlier version of kosmos-lit, whose files and keys had other names: delete the "
        f"folder or give another --eval.folder, and run `{program()} test` again"
    )
