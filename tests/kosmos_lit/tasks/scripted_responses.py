"""Runs tasks without a model, on responses that a test writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kosmos_lit.evaluation.requests import Parts, Request, Response
from kosmos_lit.evaluation.task import Outcome, Sample, Task
from kosmos_lit.inference.results import Continuation, ScoredCandidate


def requests(task: Task, sample: Sample, shots: Sequence[Sample] = ()) -> Sequence[Request]:
    """Return the first requests about a sample."""
    return next(task.ask(sample, shots))


def part_texts(parts: Parts) -> list[str]:
    """Return a prompt's parts, images as file names in brackets."""
    return [part if isinstance(part, str) else f"[{part.name}]" for part in parts]  # type: ignore[union-attr]


def prompt(task: Task, sample: Sample, shots: Sequence[Sample] = ()) -> list[str]:
    """Return the prompt of the first request."""
    return part_texts(requests(task, sample, shots)[0].parts)


def continuation(text: str) -> Continuation:
    return Continuation(text, (), "end")


def candidates(**probabilities: float) -> tuple[ScoredCandidate, ...]:
    """Return scored candidates of two tokens each, by their probabilities."""
    return tuple(ScoredCandidate(text, (math.log(p) - 0.5, 0.5)) for text, p in probabilities.items())


def outcome(task: Task, sample: Sample, *rounds: Sequence[Response]) -> Outcome:
    """Return the outcome of a sample after the responses to each of its rounds of requests."""
    generator = task.ask(sample, ())
    pending = next(generator)
    for i, responses in enumerate(rounds):
        assert len(responses) == len(pending)
        try:
            pending = generator.send(responses)
        except StopIteration as end:
            assert i == len(rounds) - 1
            value: Outcome = end.value
            return value
    raise AssertionError(f"the task has further requests: {pending}")


def metric_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics' values."""
    return {name: metric.value for name, metric in metrics.items()}
