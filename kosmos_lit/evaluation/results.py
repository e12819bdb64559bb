"""Results of an evaluation as they are on disk: `metrics.json`, and `TASK/samples.jsonl` one sample a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.evaluation.storage import METRICS, SAMPLES

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What was found for one task."""

    name: str
    """By which the configuration knows it."""
    title: str
    published: str | None
    """Key of `evaluation.published`."""
    headline: str
    chance: float | None
    """Share that guessing gets right."""
    n_shots: int
    seed: int
    n_samples: int
    """Samples that were asked, failed ones among them."""
    n_failed: int
    """Samples without an answer (an unreadable image, a prompt that is too long); no figure counts them."""
    failures: Mapping[str, int]
    """Failed samples by reason."""
    options: Mapping[str, Any]
    metrics: Mapping[str, Metric]

    @property
    def best(self) -> Metric | None:
        """The figure that stands for the task; None if it was not measured."""
        return self.metrics.get(self.headline)


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation."""

    folder: Path
    model: Mapping[str, Any]
    """Checkpoint, step, parameters and whatever else was written of it."""
    image_control: str
    """`true`, or the control that took their place."""
    machine: str
    date: str
    tasks: Mapping[str, TaskResult]

    def samples(self, task: str) -> Path:
        """Return the file with a task's samples."""
        return self.folder / task / SAMPLES


def read_results(folder: Path) -> Results:
    """Read the figures of an evaluation.

    Raises: UserError if there are none, or if the file is not what an evaluation writes.
    """
    path = folder / METRICS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of results")
    if not path.is_file():
        raise UserError(f"{folder}: no {METRICS}; `main.py test` with eval.tasks writes it, by default in RUN/eval")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tasks = {name: _task(name, task) for name, task in found["tasks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the figures of an evaluation ({type(error).__name__}: {error})") from error
    if not tasks:
        raise UserError(f"{path}: no tasks; nothing was evaluated")
    return Results(
        folder=folder, model=found.get("model") or {}, image_control=str(found.get("image_control", "true")),
        machine=str(found.get("machine") or ""), date=str(found.get("date") or ""), tasks=tasks,
    )  # fmt: skip


def _task(name: str, found: Mapping[str, Any]) -> TaskResult:
    metrics = {
        metric: Metric(_number(f["value"]), _number(f["low"]), _number(f["high"]), int(f["n"]))
        for metric, f in found["metrics"].items()
    }
    return TaskResult(
        name=name, title=found["title"], published=found.get("published"), headline=found["headline"],
        chance=found.get("chance"), n_shots=found.get("n_shots", 0), seed=found.get("seed", 0), n_samples=found["n_samples"],
        n_failed=found.get("n_failed", 0), failures=found.get("failures") or {}, options=found.get("options") or {},
        metrics=metrics,
    )  # fmt: skip


def _number(value: float | None) -> float:
    """Return a figure's number; JSON has no NaN, so a writer may have said null."""
    return NAN if value is None else float(value)


def each_sample(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every sample with the place of its line in the file, in bytes; one is in memory at a time.

    A last line that an interruption cut off is left out: its sample is asked again when the evaluation goes on.

    Raises: UserError naming the line that is no sample.
    """
    if not path.is_file():
        return
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield place, _sample(path, number, line)
            place += len(line)


def sample_at(path: Path, place: int) -> dict[str, Any]:
    """Return the sample whose line begins at a place, in bytes."""
    with path.open("rb") as file:
        file.seek(place)
        return _sample(path, 0, file.readline())


def _sample(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not a sample: {error}; remove the line to have it asked again") from error
    if not isinstance(sample, dict) or "key" not in sample:
        raise UserError(f"{path}, line {number}: not a sample: it has no key; remove the line to have it asked again")
    return sample
