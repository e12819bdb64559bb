"""Asks tasks without a model: the test says what the model answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kosmos_lit.evaluation.requests import Parts, Request, Response
from kosmos_lit.evaluation.task import Outcome, Sample, Task
from kosmos_lit.inference.results import Continuation, ScoredCandidate


def requests(task: Task, sample: Sample, shots: Sequence[Sample] = ()) -> Sequence[Request]:
    """Return what is asked first."""
    return next(task.ask(sample, shots))


def readable(parts: Parts) -> list[str]:
    """Return a prompt with images' file names in brackets."""
    return [part if isinstance(part, str) else f"[{part.name}]" for part in parts]  # type: ignore[union-attr]


def prompt(task: Task, sample: Sample, shots: Sequence[Sample] = ()) -> list[str]:
    """Return the first prompt."""
    return readable(requests(task, sample, shots)[0].parts)


def continuation(text: str) -> Continuation:
    return Continuation(text, (), "end")


def candidates(**probabilities: float) -> tuple[ScoredCandidate, ...]:
    """Return candidates with their probabilities, some of them of two tokens."""
    return tuple(ScoredCandidate(text, (math.log(p) - 0.5, 0.5)) for text, p in probabilities.items())


def outcome(task: Task, sample: Sample, *rounds: Sequence[Response]) -> Outcome:
    """Return what a task makes of the answers to each of its rounds of requests."""
    asking = task.ask(sample, ())
    asked = next(asking)
    for i, answers in enumerate(rounds):
        assert len(answers) == len(asked)
        try:
            asked = asking.send(answers)
        except StopIteration as end:
            assert i == len(rounds) - 1
            found: Outcome = end.value
            return found
    raise AssertionError(f"the task asks on: {asked}")


def plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Return figures' values."""
    return {name: metric.value for name, metric in values.items()}
